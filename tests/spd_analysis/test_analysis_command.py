import errno

import pytest

from spd_analysis import command


def test_help_keeps_the_lines_of_the_docstring_and_options_are_written_out(capsys):
    parser = command.parser("spd_analysis.mine", "First line.\n\n    indented   as it is\n")
    parser.add_argument("--steps", type=int)
    with pytest.raises(SystemExit):
        parser.parse_args(["--help"])
    shown = capsys.readouterr().out
    assert "usage: spd_analysis.mine" in shown and "\n    indented   as it is\n" in shown
    with pytest.raises(SystemExit):
        parser.parse_args(["--st", "3"])


@pytest.mark.parametrize("error, words", [
    (ValueError("no run 'x'"), "error: no run 'x'\n"),
    (OSError(errno.ENOSPC, "No space left"), "error: [Errno 28] No space left\n"),
])  # fmt: skip
def test_what_the_user_can_mend_is_one_line(error, words, capsys):
    @command.errors_are_told
    def main() -> int:
        raise error

    assert main() == 2
    assert capsys.readouterr().err == words


def test_the_rest_is_left_alone():
    @command.errors_are_told
    def works() -> int:
        return 3

    @command.errors_are_told
    def has_a_bug() -> int:
        raise TypeError

    assert works() == 3
    with pytest.raises(TypeError):
        has_a_bug()
