"""A four-node Slurm on one machine, for tests: `python slurm_cluster.py up|down|status`.

Each node is a network namespace (spd-node1 .. spd-node4) with its own host name, so multi-node
jobs really cross hosts; all of them see the same files. The controller, munge and the accounting
database live in a fifth namespace, spd-ctl, which also holds the bridge. Nothing is touched outside
the state folder but marked lines in /etc/hosts and the link /etc/slurm/slurm.conf. Needs root.

Each test process of pytest-xdist has a cluster of its own: that of gw1 is spd-node5 .. spd-node8,
with spd-ctl1.

    python slurm_cluster.py up --max-array-size 10 --set KillOnBadExit=1
    ip -n spd-node2 link set eth0 down      # cuts node2 off until it is set up again
    ip netns pids spd-node2                 # its slurmd and everything its jobs run
    PYTEST_XDIST_WORKER=gw1 python slurm_cluster.py down    # what a killed pytest -n 2 left
"""

import argparse
import fcntl
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

NUMBER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
SUFFIX = str(NUMBER) if NUMBER else ""
NODES = [f"node{4 * NUMBER + n}" for n in range(1, 5)]
CPUS, GPUS, MEMORY_MB = 16, 8, 20000
CTL, NET = f"ctl{SUFFIX}", f"10.77.{NUMBER}"
CTL_IP, LOGIN = f"{NET}.254", f"{NET}.253"  # LOGIN: this machine, where sbatch and srun are typed
ADDRESS = {node: f"{NET}.{n}" for n, node in enumerate(NODES, start=1)} | {CTL: CTL_IP}
LOGIN_LINK = f"spd-slurm{SUFFIX}"
START_S, KILL_S = 120, 60  # of one daemon, on a machine that is busy with something else

FIRST = Path(os.environ.get("SPD_SLURM_DIR", "/var/tmp/spd-slurm")).resolve()
STATE = FIRST.with_name(FIRST.name + SUFFIX)
CONF = STATE / "slurm.conf"
MARK = STATE / ".spd-slurm"  # says that the folder is ours to remove
START_SOCKET = STATE / "munge.socket"
SYSTEM_CONF = Path("/etc/slurm/slurm.conf")  # read by sbatch when SLURM_CONF is not set
HOSTS, HOSTS_MARK = Path("/etc/hosts"), f"# {LOGIN_LINK}"
LOCK = Path(f"/run/{LOGIN_LINK}.lock")

# A login shell's PATH may lack the folders of daemons.
PATH = f"{os.environ.get('PATH', '/usr/bin:/bin')}:/usr/local/sbin:/usr/sbin:/sbin"
PACKAGES = {"ip": "iproute2", "munged": "munge", "sinfo": "slurm-client"}
PACKAGES |= {"slurmctld": "slurmctld", "slurmd": "slurmd"}
ACCOUNTING_PACKAGES = {"mariadbd": "mariadb-server", "slurmdbd": "slurmdbd"}

# A requeued job may not start before its old credential expires: after two minutes unless set.
MUNGE = f"AuthType=auth/munge AuthInfo=socket={START_SOCKET},cred_expire=10"
# No cgroup plugin: those need more of the machine than a container gives.
SETTINGS = f"""{MUNGE}
    ClusterName=spd SlurmctldHost={CTL}({CTL_IP}) SlurmUser=root SlurmdUser=root
    ProctrackType=proctrack/linuxproc TaskPlugin=task/none JobAcctGatherType=jobacct_gather/linux
    SelectType=select/cons_tres SelectTypeParameters=CR_CPU GresTypes=gpu
    SlurmdParameters=config_overrides SlurmdTimeout=20 ReturnToService=2 KillWait=5 JobRequeue=1
    SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0 MinJobAge=7200
    PreemptType=preempt/partition_prio PreemptMode=REQUEUE
    StateSaveLocation={STATE}/controller SlurmdSpoolDir={STATE}/spool-%n
    SlurmctldPidFile={STATE}/slurmctld.pid SlurmdPidFile={STATE}/slurmd-%n.pid
    SlurmctldLogFile={STATE}/slurmctld.log SlurmdLogFile={STATE}/slurmd-%n.log"""
ACCOUNTING = f"""AccountingStorageType=accounting_storage/slurmdbd AccountingStorageHost={CTL_IP}
    AccountingStoragePass={START_SOCKET} AccountingStorageTRES=gres/gpu"""
NO_ACCOUNTING = "AccountingStorageType=accounting_storage/none"
SLURMDBD = f"""{MUNGE} SlurmUser=root DbdHost={CTL} DbdAddr={CTL_IP} PidFile={STATE}/slurmdbd.pid
    StorageType=accounting_storage/mysql StorageHost={CTL_IP} StorageUser=root"""

T = TypeVar("T")


def wait_for(predicate: Callable[[], T], timeout_s: float, what: str) -> T:
    """Poll until the predicate returns something true, and return that.

    The limits of tests are for a machine that is busy with something else: minutes.
    """
    deadline = time.monotonic() + timeout_s
    while not (result := predicate()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {timeout_s:g} s for {what}")
        time.sleep(0.1)
    return result


def run(*command: str | Path, check: bool = True) -> str:
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, timeout=START_S
    )
    if check and done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))}: {done.stderr.strip()}")
    return done.stdout if done.returncode == 0 else ""


def obstacle(accounting: bool = True) -> str | None:
    """Why the cluster cannot run on this machine, or None."""
    if os.geteuid() != 0:
        return "the test cluster needs root (network namespaces)"
    packages = PACKAGES | (ACCOUNTING_PACKAGES if accounting else {})
    if missing := [name for name in packages if shutil.which(name, path=PATH) is None]:
        wanted = " ".join(packages[name] for name in missing)
        return f"missing {', '.join(missing)}; run: apt-get install -y {wanted}"
    found = SYSTEM_CONF.resolve()  # a link that the first cluster's process makes or removes now
    if found != FIRST / CONF.name and found.is_file() and not found.is_symlink():
        return f"{SYSTEM_CONF} is that of another Slurm ({found})"
    if STATE.is_dir() and any(STATE.iterdir()) and not MARK.exists():
        return f"{STATE} holds something else; name another folder in SPD_SLURM_DIR"
    return None


# ---- hosts


def namespace(host: str) -> str:
    return f"spd-{host}"


def running(host: str) -> dict[int, str]:
    """Process id and name of all that runs on a host."""
    pids = run("ip", "netns", "pids", namespace(host), check=False).split()
    names: dict[int, str] = {}
    for pid in pids:
        with suppress(FileNotFoundError, ProcessLookupError):  # it may have ended since
            names[int(pid)] = Path(f"/proc/{pid}/comm").read_text().strip()
    return names


def make_hosts() -> None:
    for host in ADDRESS:
        run("ip", "netns", "add", namespace(host))
        run("ip", "-n", namespace(host), "link", "set", "lo", "up")
    ctl = namespace(CTL)
    run("ip", "-n", ctl, "link", "add", "bridge", "type", "bridge")
    run("ip", "-n", ctl, "addr", "add", f"{CTL_IP}/24", "dev", "bridge")
    run("ip", "-n", ctl, "link", "set", "bridge", "up")
    # The bridge is outside this machine's own namespace, where a firewall (Docker's) may block it.
    run("ip", "link", "add", LOGIN_LINK, "type", "veth", "peer", "name", "login", "netns", ctl)
    run("ip", "addr", "add", f"{LOGIN}/24", "dev", LOGIN_LINK)
    run("ip", "link", "set", LOGIN_LINK, "up")
    run("ip", "-n", ctl, "link", "set", "login", "master", "bridge", "up")
    for node in NODES:
        plug = ["link", "add", node, "type", "veth", "peer", "name", "eth0"]
        run("ip", "-n", ctl, *plug, "netns", namespace(node))
        run("ip", "-n", ctl, "link", "set", node, "master", "bridge", "up")
        run("ip", "-n", namespace(node), "addr", "add", f"{ADDRESS[node]}/24", "dev", "eth0")
        run("ip", "-n", namespace(node), "link", "set", "eth0", "up")
    name_hosts([f"{ip} {host} {HOSTS_MARK}" for host, ip in ADDRESS.items()])


def remove_hosts() -> None:
    for host in ADDRESS:
        if Path("/run/netns", namespace(host)).exists():
            run("ip", "netns", "del", namespace(host))
    # The kernel removes a namespace's links later, and until then their names are taken.
    run("ip", "link", "del", LOGIN_LINK, check=False)
    name_hosts([])


def name_hosts(lines: list[str]) -> None:
    """Put these in place of this cluster's lines in /etc/hosts, which other clusters may change.

    Never emptied on the way, as their jobs look hosts up there; and written in place: inside a
    container the file is a mount and cannot be replaced.
    """
    with HOSTS.open("r+") as hosts:
        fcntl.flock(hosts, fcntl.LOCK_EX)
        kept = [line for line in hosts.read().splitlines() if not line.endswith(HOSTS_MARK)]
        hosts.seek(0)
        hosts.writelines(f"{line}\n" for line in kept + lines)
        hosts.truncate()


def start(host: str, *command: str | Path) -> None:
    """Start a daemon on a host; `ip netns exec` would hide the cgroup mount that slurmd wants."""
    enter = ["nsenter", f"--net=/run/netns/{namespace(host)}", "unshare", "--uts"]
    named = ["sh", "-c", 'hostname "$0" && exec "$@"', host, *command]
    with Path(STATE, f"{command[0]}-{host}.stderr").open("a") as log:
        subprocess.Popen(
            [*enter, *named],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            cwd=STATE,
            env={"PATH": PATH, "LANG": "C.UTF-8", "SLURM_CONF": str(CONF)},
        )


# ---- configuration


def conf_text(*settings: str) -> str:
    """A conf file's lines; where settings name a key twice, the later one holds."""
    pairs = dict(pair.split("=", maxsplit=1) for pair in " ".join(settings).split())
    return "".join(f"{key}={value}\n" for key, value in pairs.items())


def slurm_conf(args: argparse.Namespace) -> str:
    accounting = ACCOUNTING if args.accounting else NO_ACCOUNTING
    lines = conf_text(SETTINGS, accounting, f"MaxArraySize={args.max_array_size}", *args.set)
    for node in NODES:
        lines += f"NodeName={node} NodeHostname={node} NodeAddr={ADDRESS[node]}"
        lines += f" CPUs={CPUS} RealMemory={MEMORY_MB} Gres=gpu:{GPUS}\n"
    members = ",".join(NODES)
    lines += f"PartitionName=main Nodes={members} Default=YES PriorityTier=10\n"
    lines += f"PartitionName=scavenge Nodes={members} PriorityTier=1 GraceTime=12\n"
    return lines


def write_state(conf: str) -> None:
    STATE.mkdir(parents=True, exist_ok=True)
    MARK.touch()
    CONF.write_text(conf)
    (STATE / "controller").mkdir()
    (STATE / "dev").mkdir()
    for gpu in range(GPUS):
        os.mknod(STATE / f"dev/gpu{gpu}", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    devices = f"File={STATE}/dev/gpu[0-{GPUS - 1}]"
    (STATE / "gres.conf").write_text(f"NodeName={','.join(NODES)} Name=gpu {devices}\n")
    # slurmd probes the cgroup mount though no plugin here uses it; this one accepts what it finds.
    (STATE / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
    secrets = {"slurmdbd.conf": conf_text(SLURMDBD).encode(), "munge.key": os.urandom(128)}
    for name, content in secrets.items():
        (STATE / name).touch(mode=0o600)
        (STATE / name).write_bytes(content)
    if STATE == FIRST:
        SYSTEM_CONF.parent.mkdir(parents=True, exist_ok=True)
        SYSTEM_CONF.unlink(missing_ok=True)
        SYSTEM_CONF.symlink_to(CONF)


# ---- daemons


def listens(host: str, port: int) -> bool:
    with socket.socket() as connection:
        connection.settimeout(1)
        return connection.connect_ex((ADDRESS[host], port)) == 0


def start_munge() -> None:
    files = [f"--{kind}-file={STATE}/munge.{kind}" for kind in ("key", "pid", "seed", "log")]
    start(CTL, "munged", "--foreground", f"--socket={START_SOCKET}", *files)
    wait_for(START_SOCKET.exists, START_S, "munge")


def start_accounting() -> None:
    (STATE / "database-tmp").mkdir()  # in /tmp they would remove each other's temporary tables
    data = ["--no-defaults", "--user=root", f"--datadir={STATE}/database"]
    data += [f"--tmpdir={STATE}/database-tmp"]
    run("mariadb-install-db", *data, "--skip-test-db", "--auth-root-authentication-method=normal")
    files = [f"--socket={STATE}/database.socket", f"--pid-file={STATE}/database.pid"]
    quick = ["--skip-grant-tables", "--innodb-flush-log-at-trx-commit=0"]
    start(CTL, "mariadbd", *data, *files, *quick, f"--bind-address={CTL_IP}")
    wait_for(lambda: listens(CTL, 3306), START_S, "MariaDB")
    start(CTL, "slurmdbd", "-D")
    wait_for(lambda: listens(CTL, 6819), START_S, "slurmdbd")
    run("sacctmgr", "--immediate", "add", "cluster", "spd")


def node_states() -> list[str]:
    return run("sinfo", "--noheader", "-N", "-p", "main", "-o", "%T", check=False).split()


def healthy(conf: str, accounting: bool) -> bool:
    if not CONF.exists() or CONF.read_text() != conf:
        return False
    daemons = {"munged", "slurmctld"} | (set(ACCOUNTING_PACKAGES) if accounting else set())
    # A node that was cut off or lost its slurmd still shows as idle for SlurmdTimeout.
    if not daemons <= set(running(CTL).values()) or not all(listens(n, 6818) for n in NODES):
        return False
    states = node_states()
    return len(states) == len(NODES) and set(states) <= {"idle", "mixed", "allocated", "completing"}


def up(args: argparse.Namespace) -> None:
    conf = slurm_conf(args)
    if healthy(conf, args.accounting):
        print(f"already up; SLURM_CONF={CONF}")
        return
    down()
    write_state(conf)
    make_hosts()
    start_munge()
    if args.accounting:
        start_accounting()
    start(CTL, "slurmctld", "-D")
    for node in NODES:
        start(node, "slurmd", "-D", "-N", node)
    wait_for(lambda: listens(CTL, 6817), START_S, "slurmctld")
    wait_for(lambda: node_states() == ["idle"] * len(NODES), START_S, "four idle nodes")
    print(f"up; SLURM_CONF={CONF}")


def kill_all(host: str) -> bool:
    """Whether there was anything left to kill."""
    pids = running(host)
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return bool(pids)


def down() -> None:
    # Nothing of the state is kept, so no daemon needs the time to end in order.
    for host in ADDRESS:
        wait_for(lambda host=host: not kill_all(host), KILL_S, f"the processes of {host} to die")
    remove_hosts()
    if SYSTEM_CONF.is_symlink() and SYSTEM_CONF.readlink() == CONF:
        SYSTEM_CONF.unlink()
    if MARK.exists():
        shutil.rmtree(STATE)


def status() -> None:
    if not (nodes := run("sinfo", check=False)):
        sys.exit("down")
    print(f"SLURM_CONF={CONF}\n{nodes}{run('squeue')}", end="")


# ---- command line


@contextmanager
def alone() -> Iterator[None]:
    """Two of these must not interleave."""
    with LOCK.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def setting(pair: str) -> str:
    if "=" not in pair or " " in pair:
        raise argparse.ArgumentTypeError("wants a line of slurm.conf, KEY=VALUE")
    return pair


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("command", choices=["up", "down", "status"])
    parser.add_argument("--max-array-size", type=int, default=1001)
    parser.add_argument("--no-accounting", dest="accounting", action="store_false")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", type=setting)
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    args = parse(argv)
    os.environ.update(PATH=PATH, SLURM_CONF=str(CONF))
    os.umask(0o022)  # munge refuses files that a group may write
    if reason := obstacle(args.accounting):
        sys.exit(f"slurm_cluster: {reason}")
    if args.command == "status":
        return status()
    with alone():
        try:
            up(args) if args.command == "up" else down()
        except (TimeoutError, RuntimeError, subprocess.TimeoutExpired) as error:
            sys.exit(f"slurm_cluster: {error}; see the logs in {STATE}")


if __name__ == "__main__":
    main(sys.argv[1:])
