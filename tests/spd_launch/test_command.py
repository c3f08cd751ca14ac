"""The command line: bad input, dry runs, what a launch writes, and that planning stays light."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from launch_configs import config

from spd_launch import ledger
from spd_launch.compose import compose
from spd_launch.errors import LaunchError
from spd_launch.ledger import new_launch
from spd_launch.validate import validate, validate_all

ROOT = Path(__file__).parent.parent.parent
LOCAL = ["+experiment=tms_5-2", "cluster=local"]

BAD = [
    (["train.steps=0"], r"choose an experiment, .*\+sweep=NAME; valid: .*tms_5-2"),
    (["+experiment=tms_52"], "no experiment named 'tms_52'; did you mean tms_5-2"),
    (["+experiment=tms_5-2", "cluster=locl"], "no cluster named 'locl'; did you mean local"),
    ([*LOCAL, "train.stepz=3"], "train.stepz=3: no field 'stepz' in train; did you mean steps"),
    ([*LOCAL, "traim.steps=3"], "no field 'traim' at the top level; did you mean train"),
    ([*LOCAL, "losses.stochastic_recn.coeff=1"], "_recn'; did you mean stochastic_recon"),
    ([*LOCAL, "eval.metrics.ci_l1.when=fast"], "no metric is named 'ci_l1'; did you mean ci_l0"),
    ([*LOCAL, "eval.metrics.identity_ci_error.modules.linear1.m=2"], "no field 'm'.*valid: .*n"),
    ([*LOCAL, "train.steps=many"], "train.steps=many: input should be a valid integer"),
    ([*LOCAL, "seed=-1"], "seed=-1: .*greater than or equal to 0"),
    ([*LOCAL, "losses.stochastic_recon.coeff=[1]"], r"losses\.stochastic_recon\.coeff=\[1\]: "),
    ([*LOCAL, "decompose.tied=[[linear1,3]]"], r"decompose\.tied\.0\.1=3: "),
    ([*LOCAL, "+losses.faithfulness={}"], "losses: faithfulness needs a coeff"),
    ([*LOCAL, "+decompose.modules.linear3=5"], "'linear3' matches no module .*linear1, linear2"),
    ([*LOCAL, "dp=3"], "does not divide by dp=3"),
    ([*LOCAL, "target.n_features=6"], "n=5: the target has target.n_features=6"),
    ([*LOCAL, "+decompose.modules={linear?: 4}"], "'linear1' is matched by"),
    ([*LOCAL, "~decompose.modules.linear2"], "decompose.tied: 'linear2' is not decomposed"),
    ([*LOCAL, "seed=0,1"], "add -m"),
    ([*LOCAL, "a=["], "cannot read the override"),
    ([*LOCAL, "seed=interval(0,1)"], "names no values to run; .*`random` of a sweep file"),
    (["experiment=glob(tsm*)", "cluster=local"], r"glob\(tsm\*\)' fits no experiment; did"),
    ([*LOCAL, "target=tmss"], "Could not find 'target/tmss'"),
    (["+experiment=tms_5-2", "cluster=cpu", "cluster.time_min=1"], "cluster.signal_delay_s=60"),
    (["+experiment=tms_5-2", "cluster=cpu", "+cluster.sbatch.signal=B:USR1@60"],
     "cluster.sbatch.signal: --signal is the launcher's: cluster.signal_delay_s"),
    ([*LOCAL, "+cluster.sbatch.open_mode=truncate"], "open_mode: --open-mode .* logs lie where"),
    ([*LOCAL, "+cluster.sbatch.arr=1-5"], "--array is the launcher's: .* launch.max_parallel"),
    ([*LOCAL, "+cluster.sbatch.clusters=other"], "only the Slurm of this machine"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"), BAD, ids=lambda x: x[-1] if isinstance(x, list) else ""
)
def test_bad_input_is_named(arguments: list[str], message: str) -> None:
    with pytest.raises(LaunchError, match=message):
        for run in compose(arguments, multirun=False):
            validate(run.values)


def test_multirun_is_the_product_of_its_lists() -> None:
    runs = compose(
        ["experiment=tms_5-2", "cluster=local", "seed=range(0,3)", "train.lr.start=1e-3,3e-3"], True
    )
    configs = [validate(run.values) for run in runs]
    assert [(c.seed, c.train.lr.start) for c in configs] == [
        (s, lr) for s in range(3) for lr in (1e-3, 3e-3)
    ]
    assert runs[0].overrides["seed"] == "0"


@pytest.mark.parametrize(
    ("argument", "seeds"),
    [
        ("seed=choice(1,4)", [1, 4]),
        ("seed=range(1,6,2)", [1, 3, 5]),
        ("seed=sort(3,1,2)", [1, 2, 3]),
        ("seed=shuffle(range(0,3))", [0, 1, 2]),
        ("seed=tag(a,choice(5,6))", [5, 6]),
    ],
)
def test_hydras_ways_to_name_values(argument: str, seeds: list[int]) -> None:
    found = [validate(run.values).seed for run in compose([*LOCAL, argument], multirun=True)]
    assert (sorted(found) if "shuffle" in argument else found) == seeds


def test_a_glob_names_files_of_a_group() -> None:
    runs = compose(["experiment=glob(tms_*,exclude=*-id)", "cluster=glob([loc*,cp*])"], True)
    found = [(run.values["experiment"], run.values["cluster"]["name"]) for run in runs]
    assert found == [(e, c) for e in ("tms_40-10", "tms_5-2") for c in ("cpu", "local")]


def test_parts_of_the_config_are_swept_like_numbers() -> None:
    losses = "losses={stochastic_recon: null},{stochastic_recon_layerwise: null}"
    modules = "decompose.modules[linear1]=5,6"
    runs = compose([*LOCAL, losses, modules], multirun=True)
    found = [validate(run.values) for run in runs]
    assert [c.losses.stochastic_recon is None for c in found] == [True, True, False, False]
    assert [c.decompose.modules for c in found] == 2 * [
        {"linear1": C, "linear2": 20} for C in (5, 6)
    ]
    assert runs[0].overrides["decompose.modules[linear1]"] == "5"


def test_one_bad_run_of_many_is_named_and_nothing_is_sent(tmp_path: Path) -> None:
    many = ["seed=range(0,100)", "train.batch_size=64,128,256,512,96", "dp=1,64"]
    drop = "cluster.gpus_per_node=64"
    done = run("spd_launch", "-m", *LOCAL, *many, drop, "eval.batch_size=64", out=tmp_path)
    assert done.returncode == 2 and not list(tmp_path.iterdir())
    assert "error: 100 of 1000 runs cannot be, so none was sent:" in done.stderr
    assert "\n       seed=0 train.batch_size=96 dp=64 experiment=" in done.stderr
    assert "train.batch_size=96 does not divide by dp=64" in done.stderr
    assert "  99 more likewise" in done.stderr
    one = ["seed=range(0,250)", "train.steps=100,0", "eval.batch_size=64", "seed=range(1,2)"]
    with pytest.raises(
        LaunchError, match=r"(?s)1 of 2 runs .*\n +train\.steps=0 .* seed=1\n.*train\.steps=0:"
    ):
        validate_all(compose([*LOCAL, *one], multirun=True))


def test_what_is_typed_again_holds_from_there() -> None:
    typed = ["losses.faithfulness.coeff=1", "losses.faithfulness=null", "seed=5,6"]
    again = ["train.steps=7,8", "seed=1,2", "losses.faithfulness.coeff=3"]
    configs = [validate(run.values) for run in compose([*LOCAL, *typed, *again], multirun=True)]
    assert [(c.train.steps, c.seed) for c in configs] == [(7, 1), (7, 2), (8, 1), (8, 2)]
    coeffs = [c.losses.faithfulness and c.losses.faithfulness.coeff for c in configs]
    assert coeffs == [3] * 4


def test_an_override_reaches_a_field_that_the_yaml_leaves_out() -> None:
    run = compose([*LOCAL, "losses.faithfulness.coeff=2", "losses.stochastic_recon=null"], False)[0]
    losses = validate(run.values).losses
    assert losses.faithfulness is not None and losses.faithfulness.coeff == 2
    assert losses.stochastic_recon is None


def test_the_current_directory_has_its_own_profiles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "it's mine" / "slurm_templates" / "cluster"
    folder.mkdir(parents=True)
    text = (ROOT / "slurm_templates/cluster/cpu.yaml").read_text()
    (folder / "mine.yaml").write_text(text.replace("name: cpu", "name: mine"))
    monkeypatch.chdir(folder.parent.parent)
    assert (
        validate(compose(["+experiment=tms_5-2", "cluster=mine"], False)[0].values).cluster.name
        == "mine"
    )


@pytest.mark.parametrize(
    "file", sorted((ROOT / "slurm_templates/cluster").glob("*.yaml")), ids=lambda f: f.stem
)
def test_every_profile_is_valid(file: Path) -> None:
    validate(compose(["+experiment=tms_5-2", f"cluster={file.stem}"], False)[0].values)


def test_an_unwritable_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LaunchError, match=r"cannot write .*file/.*launch\.out_dir"):
        new_launch([({}, config(launch__out_dir=str(tmp_path / "file")))])


def test_nothing_is_left_of_a_launch_that_failed_before_it_was_sent(tmp_path: Path) -> None:
    plan, launch = new_launch([({}, config(launch__out_dir=str(tmp_path)))])
    with pytest.raises(LaunchError), ledger.all_or_nothing(launch, plan):
        raise LaunchError("no")
    assert not [f for f in tmp_path.rglob("*") if f.is_file()] and not list(tmp_path.glob("runs/*"))


def run(*arguments: str, out: Path) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "SPD_OUT_DIR": str(out)}
    line = [sys.executable, "-m", *arguments]
    nothing = subprocess.DEVNULL  # no terminal that could be asked
    return subprocess.run(line, cwd=ROOT, env=env, stdin=nothing, capture_output=True, text=True)


def test_commands_end_with_one_message_and_code_2(tmp_path: Path) -> None:
    done = run("spd_launch", *LOCAL, "dp=3", out=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: train.batch_size=4096 does not divide by dp=3\n"
    done = run("spd_launch.status", "nothing", out=tmp_path)
    assert done.returncode == 2 and "no launches in" in done.stderr
    assert not list(tmp_path.iterdir())


def test_config_is_shown_and_dry_run_writes_nothing(tmp_path: Path) -> None:
    shown = run("spd_launch", *LOCAL, "seed=7", "--cfg", "job", out=tmp_path)
    assert yaml.safe_load(shown.stdout)["seed"] == 7
    done = run("spd_launch", "-m", *LOCAL, "seed=0,1", "launch.dry_run=true", out=tmp_path)
    assert done.returncode == 0 and "2 run(s), each 1 node(s) x 1 process(es)" in done.stdout
    on_slurm = ["+experiment=tms_5-2", "cluster=cpu", "seed=0,1", "dp=2", "launch.dry_run=true"]
    done = run("spd_launch", "-m", *on_slurm, out=tmp_path)
    assert "1 target(s), each 1 node(s) x 1 process(es)" in done.stdout
    assert "2 run(s), each 1 node(s) x 2 process(es)" in done.stdout
    assert done.stdout.count("   after target-tms-") == 2
    assert not list(tmp_path.iterdir())


def test_the_target_of_another_run_is_taken_before_anything_is_sent(tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    small = ["+experiment=tms_5-2", "target.steps=1000", "target.batch_size=512"]
    trained = run("spd_launch", *small, "cluster=local", "launch.goal=target", out=theirs)
    assert trained.returncode == 0, trained.stdout + trained.stderr
    [other] = (theirs / "runs").iterdir()
    ours, take = tmp_path / "ours", f"target.from_run={other}"
    for wrong in (["target.from_run=nowhere"], [take, "target.n_hidden=3"]):
        done = run("spd_launch", "+experiment=tms_5-2", "cluster=cpu", *wrong, out=ours)
        assert done.returncode == 2 and re.search(
            r"^error: .*(no run|n_hidden=2 and 3)", done.stderr
        )
        assert not (ours / "launches").exists() and not (ours / "runs").exists()
    planned = run(
        "spd_launch", "+experiment=tms_5-2", "cluster=cpu", take, "launch.dry_run=true", out=ours
    )
    assert "1 run(s)" in planned.stdout and "target(s)" not in planned.stdout
    only = ["+experiment=tms_5-2", "cluster=local", "launch.goal=target"]
    # A path is the same run from everywhere.
    done = run("spd_launch", *only, f"target.from_run={os.path.relpath(other, ROOT)}", out=ours)
    assert f"took the target of {other}" in done.stderr and "nothing to do" in done.stdout
    [kept] = ours.glob("targets/*/target.safetensors")
    [trained_one] = theirs.glob("targets/*/target.safetensors")
    assert kept.read_bytes() == trained_one.read_bytes()


@pytest.mark.parametrize(
    "arguments", [["--help"], [*LOCAL, "launch.dry_run=true"]], ids=["help", "dry"]
)
def test_planning_loads_no_torch(arguments: list[str]) -> None:
    code = (
        "import sys, spd_launch.__main__ as m\n"
        "sys.argv[1:] = " + repr(arguments) + "\n"
        "try: m.main()\n"
        "except SystemExit: pass\n"
        "assert 'torch' not in sys.modules and 'submitit' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def test_no_launcher_module_loads_torch() -> None:
    names = [f.stem for f in (ROOT / "spd_launch").glob("*.py")]
    code = f"import sys\nfor n in {names}: __import__('spd_launch.' + n)\n"
    code += "assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
