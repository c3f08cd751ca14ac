"""Completion for bash and zsh: the words that a command line of ours may go on with.

    eval "$(python -m spd_launch --completion bash)"       in ~/.bashrc; zsh in ~/.zshrc

The shell hands the word at the cursor to `python -m spd_launch --complete WORD`.
"""

from typing import Literal, get_args, get_origin

from spd_launch.compose import CONF, cluster_names, experiment_names, names_in, sweep_names

# bash takes the = in a word for its end, so it replaces only what comes after that.
BASH = """\
_spd_launch() {
    local line="${COMP_LINE:0:COMP_POINT}" found=""
    local word="${line##* }"
    if [[ $line == *" -m spd_launch "* ]]; then
        found=$("${COMP_WORDS[0]}" -m spd_launch --complete="$word" 2>/dev/null)
    elif [[ $line == *" -m spd_launch."* ]]; then
        found="latest $(ls "${SPD_OUT_DIR:-outputs}/launches" 2>/dev/null)"
    fi
    COMPREPLY=($(compgen -W "$found" -- "$word"))
    [[ $COMP_WORDBREAKS == *=* && $word == *=* ]] && COMPREPLY=("${COMPREPLY[@]#"${word%=*}="}")
}
complete -o default -o nospace -F _spd_launch python python3"""

ZSH = """\
_spd_launch() {
    if [[ "$words[2] $words[3]" == "-m spd_launch" ]]; then
        compadd -S '' -- ${(f)"$($words[1] -m spd_launch --complete="$words[CURRENT]" 2>/dev/null)"}
    elif [[ "$words[2] $words[3]" == "-m spd_launch."* ]]; then
        compadd -- latest ${SPD_OUT_DIR:-outputs}/launches/*(N:t)
    else
        (( $+functions[_python] )) && _python "$@" || _files
    fi
}
compdef _spd_launch python python3"""

SCRIPTS = {"bash": BASH, "zsh": ZSH}
NAMES = {"experiment": experiment_names, "cluster": cluster_names, "sweep": sweep_names}
OPTIONS = ["--help", "--multirun", "--cfg", "--completion"]


def candidates(word: str) -> list[str]:
    """All whole words that begin with this one; of a key, up to its next dot or its =."""
    key, equals, value = word.partition("=")
    if equals:
        before = value.rpartition(",")[0]  # of several values, the last one
        start = f"{key}={before}," if before else f"{key}="
        found = [start + name for name in _values(key.lstrip("+"))]
    elif word.startswith("-"):
        found = OPTIONS
    else:
        plus = "+" if word.startswith("+") else ""
        found = [plus + name for name in _keys(word.removeprefix(plus))]
    return sorted(name for name in found if name.startswith(word))


def _values(key: str) -> list[str]:
    if key in NAMES:
        return NAMES[key]()
    if "." not in key and (CONF / key).is_dir():
        return names_in(key)
    from spd_launch.config import JobConfig
    from spd_launch.validate import types_at

    values: list[str] = []
    for annotation in types_at(key.split("."), JobConfig):
        if get_origin(annotation) is Literal:
            values += map(str, get_args(annotation))
        if annotation is bool:
            values += ["true", "false"]
        if annotation is type(None):
            values.append("null")
    return values


def _keys(word: str) -> list[str]:
    """The keys of the part of the config that the word has reached, with their dot or =."""
    from pydantic import BaseModel

    from spd_launch.config import JobConfig
    from spd_launch.validate import field_names, types_at

    *path, _ = word.split(".")
    found = [] if path else [f"{name}=" for name in (*NAMES, *_groups())]
    for name in field_names(path, JobConfig):
        key, types = ".".join([*path, name]), types_at([*path, name], JobConfig)
        models = [isinstance(t, type) and issubclass(t, BaseModel) for t in types]
        found += [f"{key}."] if any(models) else []
        found += [] if all(models) else [f"{key}="]
    return list(dict.fromkeys(found))


def _groups() -> list[str]:
    return [folder.name for folder in CONF.iterdir() if folder.is_dir()]
