"""A real Slurm on this machine for tests: munged, slurmctld, and a slurmd a node; nodes are namespaces, their GPUs device files.

No systemd, no cgroups; everything lives in one folder and is stopped by its own pid files. It needs root.
"""

import contextlib
import fcntl
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

DAEMONS = ("munged", "slurmctld", "slurmd", "scontrol")
PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge", "iproute2", "procps")
SUBNET, CONTROLLER = "10.79.0", "10.79.0.254"
CONF = """
ClusterName=tests
SlurmctldHost={host}({controller})
SlurmctldPort=26817
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# Short, for a requeued job waits until the credential of its last start has expired.
AuthInfo=socket={lab}/munge.socket,cred_expire=5
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
StateSaveLocation={lab}/state
SlurmdSpoolDir={lab}/spool/%n
SlurmctldPidFile={lab}/slurmctld.pid
SlurmdPidFile={lab}/slurmd.%n.pid
SlurmctldLogFile={lab}/slurmctld.log
SlurmdLogFile={lab}/slurmd.%n.log
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SlurmctldParameters=preempt_send_user_signal
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
SlurmdTimeout=10
MinJobAge=3600
KillWait=5
UnkillableStepTimeout=20
JobRequeue=1
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
GresTypes=gpu
{nodes}
PartitionName=normal Nodes=n[1-{num_nodes}] Default=YES MaxTime=INFINITE DefaultTime=60 State=UP PriorityTier=1 GraceTime=60
PartitionName=gpu Nodes=n[1-{num_nodes}] MaxTime=INFINITE DefaultTime=60 State=UP PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=n[1-{num_nodes}] MaxTime=INFINITE DefaultTime=60 State=UP PriorityTier=10 PreemptMode=OFF
"""


def why_not():
    """Return why a Slurm can't be had on this machine, or an empty text; installs its packages if need be and possible."""
    if os.geteuid() != 0:
        return "a Slurm of our own needs root"
    if all(map(shutil.which, DAEMONS)):
        return ""
    if not shutil.which("apt-get"):
        return "no Slurm here, and no apt-get to install it"
    variables = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True, "env": variables}
    subprocess.run(["apt-get", "update", "-qq"], **quiet)
    done = subprocess.run(["apt-get", "install", "-y", "-qq", "--no-install-recommends", *PACKAGES], **quiet)
    return "" if done.returncode == 0 else f"apt-get could not install Slurm: {done.stderr.strip()[-300:]}"


class SlurmCluster:
    """A Slurm cluster on this machine.

    Args:
        lab: its folder, empty.
        num_nodes: n1, n2 ...
        gpus: of a node; the null device stands for each.
        cpus: of a node, whatever the machine has.
        networks: whether every node is a network namespace with an address of its own; otherwise all share the host's.
    """

    def __init__(self, lab, num_nodes=2, gpus=2, cpus=4, networks=False):
        self.lab, self.num_nodes, self.gpus, self.cpus, self.networks = Path(lab), num_nodes, gpus, cpus, networks
        self._lock = None
        self.environment = os.environ | {"SLURM_CONF": str(self.lab / "slurm.conf")}

    def __enter__(self):
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _start(self):
        for folder in ("state", "spool"):
            (self.lab / folder).mkdir(parents=True)
        os.chmod(self.lab, 0o755)  # munged is wary of folders that others may write
        self._write_configuration()
        key = self.lab / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        files = {"socket": "munge.socket", "pid-file": "munged.pid", "log-file": "munged.log", "seed-file": "munge.seed"}
        self.run("munged", f"--key-file={key}", *[f"--{name}={self.lab / file}" for name, file in files.items()], "--force")
        if self.networks:
            self._make_networks()
        self.run("slurmctld")
        for node in self.nodes:
            self.start_node(node)
        idle = ("sinfo", "-h", "-p", "normal", "-t", "idle", "-o", "%D")
        self.wait_until(lambda: self.run(*idle).strip() == str(self.num_nodes), 60, "nodes to be idle")

    @property
    def nodes(self):
        return [f"n{number}" for number in range(1, self.num_nodes + 1)]

    def _address(self, number):
        return f"{SUBNET}.{number}" if self.networks else "127.0.0.1"

    def _write_configuration(self):
        hardware = f"CPUs={self.cpus} Boards=1 SocketsPerBoard=1 CoresPerSocket={self.cpus} ThreadsPerCore=1 RealMemory=64000"
        ports = [26818 if self.networks else 26820 + number for number in range(1, self.num_nodes + 1)]
        nodes = "\n".join(
            f"NodeName=n{number} NodeHostname=n{number} NodeAddr={self._address(number)} Port={port} {hardware} Gres=gpu:{self.gpus}"
            for number, port in enumerate(ports, 1)
        )
        controller = CONTROLLER if self.networks else "127.0.0.1"
        values = {"host": socket.gethostname(), "controller": controller, "lab": self.lab, "nodes": nodes, "num_nodes": self.num_nodes}
        (self.lab / "slurm.conf").write_text(CONF.format(**values))
        for number in range(self.gpus):
            os.mknod(self.lab / f"gpu{number}", 0o600 | 0o020000, os.makedev(1, 3))  # a GPU must be a device file
        files = f"{self.lab}/gpu[0-{self.gpus - 1}]" if self.gpus > 1 else f"{self.lab}/gpu0"
        (self.lab / "gres.conf").write_text(f"AutoDetect=off\nNodeName=n[1-{self.num_nodes}] Name=gpu File={files}\n")
        own = "".join(f"{self._address(number)} n{number}\n" for number in range(1, self.num_nodes + 1))
        (self.lab / "hosts").write_text(Path("/etc/hosts").read_text() + own)

    def _make_networks(self):
        # Names, addresses and ports are the machine's: another cluster that lives has them, and one waits for its end. The kernel gives
        # the lock back when its holder is killed.
        self._lock = open(Path(tempfile.gettempdir()) / "dist_vsd_slurm.lock", "w")  # noqa: SIM115
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self._remove_networks()  # of a test run that was killed
        run = self.run
        run("ip", "link", "add", "vsdbr", "type", "bridge")
        run("ip", "addr", "add", f"{CONTROLLER}/24", "dev", "vsdbr")
        run("ip", "link", "set", "vsdbr", "up")
        for number, node in enumerate(self.nodes, 1):
            run("ip", "netns", "add", f"vsd-{node}")
            run("ip", "link", "add", f"vsd{number}", "type", "veth", "peer", "name", "eth0", "netns", f"vsd-{node}")
            run("ip", "link", "set", f"vsd{number}", "master", "vsdbr", "up")
            run("ip", "-n", f"vsd-{node}", "addr", "add", f"{self._address(number)}/24", "dev", "eth0")
            for link in ("lo", "eth0"):
                run("ip", "-n", f"vsd-{node}", "link", "set", link, "up")

    def _remove_networks(self):
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        for number, node in enumerate(self.nodes, 1):
            subprocess.run(["ip", "link", "del", f"vsd{number}"], **quiet)
            subprocess.run(["ip", "netns", "del", f"vsd-{node}"], **quiet)
        subprocess.run(["ip", "link", "del", "vsdbr"], **quiet)

    def start_node(self, node):
        """Start a node's slurmd under a host name, an /etc/hosts and, with networks, an address of its own."""
        (self.lab / "spool" / node).mkdir(exist_ok=True)
        inside = ["nsenter", f"--net=/run/netns/vsd-{node}"] if self.networks else []
        script = 'hostname "$1" && mount --bind "$2" /etc/hosts && exec slurmd -N "$1"'
        self.run(*inside, "unshare", "--uts", "--mount", "sh", "-c", script, "sh", node, str(self.lab / "hosts"))

    def lose(self, node):
        """Let a node die: its slurmd and whatever runs below it, at once."""
        pid = int((self.lab / f"slurmd.{node}.pid").read_text())
        namespace = os.readlink(f"/proc/{pid}/ns/uts")
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if os.readlink(process / "ns/uts") == namespace:
                    os.kill(int(process.name), signal.SIGKILL)

    def run(self, *command):
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr or done.stdout}"
        return done.stdout

    def sbatch(self, *arguments, cwd, environment=None):
        """Submit a job; return its id."""
        variables = self.environment | (environment or {})
        command = ["sbatch", "--parsable", *map(str, arguments)]
        done = subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def state(self, job):
        """Return the state of a job or array task, such as PENDING or COMPLETED."""
        return self.run("squeue", "-h", "-t", "all", "-j", str(job), "-o", "%T").strip()

    def details(self, job):
        """Return what `scontrol show job` says as a mapping."""
        words = self.run("scontrol", "-o", "show", "job", str(job)).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, job, *states, seconds=240):
        """Wait until a job is in one of some states; return it."""
        self.wait_until(lambda: self.state(job) in states, seconds, f"job {job} to be {' or '.join(states)}")
        return self.state(job)

    def wait_until(self, condition, seconds, what):
        end = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end:
                state = self.run("squeue", "-t", "all") + self.run("sinfo", "-N", "-l")
                raise AssertionError(f"waited {seconds} s for {what}:\n{state}")
            time.sleep(0.5)  # a question starts a program

    def __exit__(self, *_error):
        with contextlib.suppress(Exception):
            self.run("scancel", "--state=PENDING,RUNNING,SUSPENDED", "-u", "root")
            self.wait_until(lambda: not self.run("squeue", "-h").strip(), 20, "jobs to end")
        for file in [*self.lab.glob("slurmd.*.pid"), self.lab / "slurmctld.pid", self.lab / "munged.pid"]:
            with contextlib.suppress(OSError, ValueError):
                stop(int(file.read_text()))
        if self._lock is not None:  # else they are another cluster's, or nobody's
            self._remove_networks()
            self._lock.close()


def stop(pid):
    """End a daemon, gently first."""
    os.kill(pid, signal.SIGTERM)
    for _ in range(100):
        with contextlib.suppress(OSError):
            if "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text():
                time.sleep(0.1)
                continue
        return
    os.kill(pid, signal.SIGKILL)
