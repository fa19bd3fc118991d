#!/usr/bin/python3
"""Tests of ci/sweep: how a grid is divided, what is refused, and a real Slurm (controller and two node daemons on this
machine) of which a node is killed in the middle. KVQ_BENCH_EXE: the kvqbench that measures (default
build/release/kvqbench). Without Slurm (Debian: munge slurm-client slurmctld slurmd) or root that part is skipped."""

import glob
import hashlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import unittest

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
KVQBENCH = os.environ.get("KVQ_BENCH_EXE") or os.path.join(ROOT, "build", "release", "kvqbench")
GOLDEN = os.path.join(ROOT, "accuracy", "golden")
ENVIRONMENT = {**os.environ, "KVQ_BENCH_EXE": KVQBENCH, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
os.environ["PATH"] += ":/usr/sbin:/sbin"
PROGRAMS = ["munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol"]
ABSENT = [name for name in PROGRAMS if not shutil.which(name)]
NO_SLURM = f"{', '.join(ABSENT)} not there" if ABSENT else "the daemons want root" if os.getuid() else ""


def run(*command, environment=ENVIRONMENT):
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def read(path):
    with open(path, encoding="utf-8", errors="replace") as file:
        return file.read()


def wait_for(what, condition, seconds=30):
    """The condition's first true value."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        value = condition()
        if value:
            return value
        time.sleep(0.02)
    raise AssertionError(f"{what}: not within {seconds} s")


def deterministic(path):
    """What must not depend on where and how often a run was interrupted; as accuracy/resume_test.cc says it."""
    data = json.loads(read(path))
    data.pop("history", None)
    for fact in ("date", "load_avg", "mhz_per_cpu", "cpu_scaling_enabled", "read_gb_per_s"):
        data["context"].pop(fact, None)
    moves = re.compile(r"^(real_time|cpu_time|elapsed_s)$|_ms|ms_per_|per_s|peak_fraction|share_of_|rss_"
                       r"|foreign_processors|disturbed")
    data["benchmarks"] = [{name: value.split("; disturbed")[0] if name == "label" else value
                           for name, value in entry.items() if not moves.search(name)} for entry in data["benchmarks"]]
    return data


class Case(unittest.TestCase):
    def setUp(self):
        self.folder = tempfile.mkdtemp(prefix="kvq_sweep_")
        self.addCleanup(shutil.rmtree, self.folder)
        self.tiny, self.text = os.path.join(self.folder, "tiny"), os.path.join(self.folder, "text.txt")
        shutil.copytree(os.path.join(GOLDEN, "models", "llama-study"), self.tiny)
        shutil.copytree(os.path.join(GOLDEN, "tokenizer"), self.tiny, dirs_exist_ok=True)
        with open(self.text, "w") as file:
            file.write("The capital of France is Paris. " * 4000)
        self.dir = os.path.join(self.folder, "sweep")
        self.environment = dict(ENVIRONMENT)

    def flags(self, **other):
        flags = {"models": self.tiny, "corpus-file": self.text, "schemes": "int4-hqq@residual=16,int8-hqq@residual=16",
                 "contexts": "48,64", "windows": 2, "runs": 1, "decode-tokens": 2, "dtype": "float32",
                 "benchmark_filter": "kv_size|perplexity|error|distribution", **other}
        return [f"--{name.replace('corpus_', 'corpus-')}={value}" for name, value in flags.items() if value is not None]

    def sweep(self, *arguments):
        return run(os.path.join(HERE, "sweep"), *arguments, environment=self.environment)

    def refused(self, arguments, *words):
        done = self.sweep(*arguments)
        self.assertEqual((done.returncode, done.stdout, done.stderr.count("\n")), (2, "", 1), done.stderr)
        for word in words:
            self.assertIn(word, done.stderr)

    def shards(self):
        return read(os.path.join(self.dir, "shards.txt")).splitlines()

    def hashes(self):
        return [hashlib.sha256((line + "\n").encode()).hexdigest()[:12] for line in self.shards()]

    def measure(self, line):
        """What a task does."""
        name = self.hashes()[self.shards().index(line)]
        path = os.path.join(self.dir, f"cell-{name}", "benchmarks.json")
        os.makedirs(os.path.dirname(path), exist_ok=True)
        done = run(KVQBENCH, *line.split(), f"--benchmark_out={path}")
        self.assertEqual(done.returncode, 0, done.stderr)
        return path


class Grid(Case):
    def test_every_benchmark_is_in_one_shard(self):
        for by, count, flags in [("models,backends,schemes,contexts,batch", 6, {}), ("models", 1, {}),
                                 ("contexts,measurements", 6, {"benchmark_filter": "kv_size|error|distribution"}),
                                 ("schemes", 3, {"schemes": "none,int8-hqq+int4-hqq@residual=16,int4-hqq"}),
                                 ("contexts", 2, {"benchmark_filter": "^(kv_size/.*ctx:48|error)"}),
                                 ("measurements", 2, {"benchmark_filter": "-^[^de]|decode|quantize|error.*ctx:48"}),
                                 ("batch", 2, {"batch": "1,2", "backends": "sdpa,eager"})]:
            with self.subTest(by=by, flags=flags):
                shutil.rmtree(self.dir, ignore_errors=True)
                done = self.sweep("--out", self.dir, "--by", by, "--no-submit", *self.flags(**flags))
                self.assertEqual(done.returncode, 0, done.stderr)
                whole = run(KVQBENCH, *self.flags(**flags), "--benchmark_list_tests").stdout.split()
                parts = [run(KVQBENCH, *line.split(), "--benchmark_list_tests").stdout.split()
                         for line in self.shards()]
                self.assertEqual(sorted(sum(parts, [])), sorted(whole))
                self.assertEqual(len(parts), count)
                self.assertTrue(all(parts))

    def test_single_items_are_gathered_with_their_cells(self):
        flags = self.flags(benchmark_filter="drift|kv_size", contexts="24", **{"decode-tokens": 8})
        self.assertEqual(self.sweep("--out", self.dir, "--no-submit", *flags).returncode, 0)
        for line in self.shards():
            self.measure(line)
        self.assertEqual(self.sweep("gather", self.dir).returncode, 0)
        whole, gathered = os.path.join(self.folder, "whole.json"), os.path.join(self.dir, "gathered", "benchmarks.json")
        self.assertEqual(run(KVQBENCH, *flags, f"--benchmark_out={whole}").returncode, 0)
        items = read(gathered + ".samples.jsonl")
        self.assertEqual(items.count("\n"), 4)  # two specs, two prompts
        self.assertEqual(items, read(whole + ".samples.jsonl"))

    def test_gathered_equals_one_run_and_mixes_nothing(self):
        self.assertEqual(self.sweep("--out", self.dir, "--no-submit", *self.flags()).returncode, 0)
        self.refused(["gather", self.dir], "no results yet")
        lines = sorted(self.shards(), key=lambda line: "--schemes=none" in line)
        first = self.measure(lines[0])
        part = self.sweep("gather", self.dir)
        self.assertEqual(part.returncode, 1)
        self.assertIn("3 of 14 benchmarks, 0 failed, 11 missing", part.stderr)
        paths = [first] + [self.measure(line) for line in lines[1:]]
        self.assertEqual(self.sweep("status", self.dir).stdout, "6 shards: 6 done; 14 of 14 benchmarks\n")
        self.assertEqual(self.sweep("gather", self.dir).returncode, 0)
        whole, gathered = os.path.join(self.folder, "whole.json"), os.path.join(self.dir, "gathered", "benchmarks.json")
        self.assertEqual(run(KVQBENCH, *self.flags(), f"--benchmark_out={whole}").returncode, 0)
        self.assertEqual(deterministic(gathered), deterministic(whole))
        # kvqbench finds all there.
        again = run(KVQBENCH, *self.flags(), f"--benchmark_out={gathered}")
        self.assertIn("has 14 of 14 benchmarks; nothing to do", again.stderr)
        report = run(os.path.join(HERE, "report"), os.path.dirname(gathered), "--out", os.path.join(self.folder, "r"))
        self.assertEqual(report.returncode, 0, report.stderr)
        was = read(paths[3])
        for fact, value in [("kvqbench_sha256", "0"), ("seed", "7"), ("corpus_sha256", "0"), ("model_tokenizer tiny", "0"), ("new", "x")]:
            data = json.loads(was)
            data["context"][fact] = value
            with open(paths[3], "w") as file:
                json.dump(data, file)
            self.refused(["gather", self.dir], paths[3], f"{fact}={value}", "never mixed")
        with open(paths[3], "w") as file:
            file.write(was[:-30])
        self.refused(["gather", self.dir], paths[3], "cut off")
        data = json.loads(was)
        data["benchmarks"][0].update(error_occurred=True, error_message="failed: planted")
        with open(paths[3], "w") as file:
            json.dump(data, file)
        self.assertEqual(self.sweep("gather", self.dir).returncode, 1)
        self.assertRegex(self.sweep("status", self.dir).stdout, "13 of 14 benchmarks, 1 failed\nmissing +2/3, 1 failed")

    def test_bad_input(self):
        out = ["--out", self.dir, "--no-submit"]
        self.refused(self.flags(), "--out")
        self.refused(out, "--schemes")
        self.refused([*out, *self.flags(dtype=None)], "--dtype", "auto")
        self.refused([*out, *self.flags(schemes="int5-hqq")], "int5-hqq")
        self.refused([*out, *self.flags(benchmark_filter="nothing")], "nothing", "matches none")
        self.refused([*out, *self.flags(benchmark_out="x.json")], "--benchmark_out")
        self.refused([*out, *self.flags(models="/a b")], "space")
        self.refused([*out, "--by=rows", *self.flags()], "--by", "rows", "schemes")
        self.refused([*out, "x", *self.flags()], "unknown argument 'x'")
        self.refused(["--out", self.folder + "/a b", *self.flags()], "a b", "space")
        self.refused([self.folder], "no sweep")
        self.refused(["status", self.folder], "no sweep")
        self.refused(["gather"], "wants one folder")
        self.assertFalse(os.path.exists(self.dir))
        self.assertEqual(self.sweep(*out, *self.flags()).returncode, 0)
        self.assertEqual(self.sweep(*out, *self.flags()).returncode, 0)
        self.refused([*out, *self.flags(windows=3)], "windows=2", "windows=3", "another folder")
        self.refused([*out, "--by=schemes", *self.flags()], "sweep by", "another folder")
        self.refused([self.dir, "--windows=3"], "--windows=3")
        self.environment["PATH"] = os.path.join(self.folder, "empty") + ":/usr/bin/none"
        self.refused([self.dir], "sbatch is not there")
        state = json.loads(read(os.path.join(self.dir, "sweep.json")))
        state["sha256"] = "0"
        with open(os.path.join(self.dir, "sweep.json"), "w") as file:
            json.dump(state, file)
        self.refused([self.dir], "not the build")

    def test_what_may_differ_is_what_kvqbench_lets_differ(self):
        source = read(os.path.join(ROOT, "benchmarks", "results_file.cc"))
        facts = re.search(r"kFacts = \{(.*?)\}", source, re.S).group(1)
        ours = re.search(r"MAY_DIFFER = \{(.*?)\}", read(os.path.join(HERE, "sweep")), re.S).group(1)
        self.assertEqual(sorted(re.findall(r'"(\w+)"', facts)), sorted(re.findall(r'"(\w+)"', ours)))


# ---- a real Slurm

def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for item in sockets:
        item.bind(("127.0.0.1", 0))
    ports = [item.getsockname()[1] for item in sockets]
    for item in sockets:
        item.close()
    return ports


def parent(pid):
    return int(read(f"/proc/{pid}/stat").rpartition(")")[2].split()[1])


class Cluster:
    """A controller and node daemons n1 and n2 of one CPU each, all their files in `folder`."""

    def __init__(self, folder):
        self.folder, self.daemons = folder, {}
        host, ports = socket.gethostname().partition(".")[0], free_ports(3)
        self.munge, conf = os.path.join(folder, "munge"), os.path.join(folder, "slurm.conf")
        for name in ("munge", "state", "spool-n1", "spool-n2"):
            os.makedirs(os.path.join(folder, name), mode=0o755)
        os.chmod(folder, 0o755)  # munged wants its socket to be reached by all
        with open(os.path.join(folder, "key"), "wb") as file:
            os.fchmod(file.fileno(), 0o600)
            file.write(os.urandom(128))
        with open(conf, "w") as file:
            file.write(f"""ClusterName=kvq
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
AuthType=auth/munge
AuthInfo=socket={self.munge}/socket
CryptoType=crypto/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
MaxArraySize=5
SchedulerParameters=sched_interval=1,bf_interval=1
ReturnToService=2
SlurmdTimeout=4
InactiveLimit=0
KillWait=1
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1
PartitionName=all Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
""")
        self.environment = {**ENVIRONMENT, "SLURM_CONF": conf}

    def start(self):
        try:
            self.start_all()
        except AssertionError as error:
            logs = [read(path)[-500:] for path in sorted(glob.glob(f"{self.folder}/*.out"))]
            raise AssertionError("\n".join([str(error), *logs])) from None

    def start_all(self):
        self.spawn("munged", "munged", "--foreground", "--force", f"--key-file={self.folder}/key",
                   f"--socket={self.munge}/socket", f"--pid-file={self.munge}/pid", f"--log-file={self.munge}/log",
                   f"--seed-file={self.munge}/seed")
        wait_for("munged", lambda: os.path.exists(f"{self.munge}/socket"))
        self.spawn("slurmctld", "slurmctld", "-D")
        for node in ("n1", "n2"):
            self.spawn(node, "slurmd", "-D", "-N", node)
        wait_for("two idle nodes", lambda: self.states() == {"n1": "idle", "n2": "idle"})

    def spawn(self, name, *command):
        with open(os.path.join(self.folder, f"{name}.out"), "w") as out:
            self.daemons[name] = subprocess.Popen(command, stdout=out, stderr=out, env=self.environment)

    def states(self):
        listed = run("sinfo", "--noheader", "--Node", "--format=%N %T", environment=self.environment)
        return dict(line.split() for line in listed.stdout.splitlines())

    def tasks(self):
        listed = run("squeue", "--noheader", "--array", "--format=%F_%K %T %N %r", environment=self.environment)
        return listed.stdout.splitlines()

    def stop(self):
        run("scancel", "--user=root", environment=self.environment)
        for name in ("n1", "n2", "slurmctld", "munged"):
            if name in self.daemons:
                self.daemons[name].terminate()
        for daemon in self.daemons.values():
            try:
                daemon.wait(5)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


@unittest.skipIf(NO_SLURM, NO_SLURM)
class Slurm(Case):
    def setUp(self):
        super().setUp()
        folder = tempfile.mkdtemp(prefix="kvq_slurm_")
        self.addCleanup(shutil.rmtree, folder)
        self.cluster = Cluster(folder)
        self.addCleanup(self.cluster.stop)
        self.cluster.start()
        self.environment = self.cluster.environment

    def kill_node(self, node):
        """Kills the node's daemon, its step and its kvqbench, once that has measured a part of a shard."""
        def in_a_shard():
            for lock in glob.glob(f"{self.dir}/cell-*/benchmarks.json.lock"):
                log = os.path.join(os.path.dirname(lock), "log.txt")
                try:
                    pid = int(re.match(r"pid (\d+) on ", read(lock)).group(1))
                    os.kill(pid, signal.SIGSTOP)  # so that it stays where it is
                except (OSError, AttributeError):
                    continue  # just gone, or just come
                try:
                    there = len(json.loads(read(lock[:-len(".lock")]))["benchmarks"])
                except FileNotFoundError:
                    there = 0
                if 0 < there < 4 and re.findall(r"^job \S+ on (\w+),", read(log), re.M)[-1] == node:
                    return pid, lock, there
                os.kill(pid, signal.SIGCONT)
            return None

        pid, lock, there = wait_for(f"a shard begun on {node}", in_a_shard)
        step = parent(pid)
        self.assertEqual(read(f"/proc/{step}/comm").strip(), "slurmstepd")
        self.cluster.daemons[node].kill()
        self.cluster.daemons[node].wait()
        os.kill(step, signal.SIGKILL)
        os.kill(pid, signal.SIGKILL)
        return os.path.dirname(lock), there

    def jobs(self):
        return json.loads(read(os.path.join(self.dir, "sweep.json")))["jobs"]

    def task(self, line):
        """The queue's line of a shard, empty if it is not in the queue."""
        names = [f"{job}_{line - first} " for job, first in self.jobs()]
        return next((task for task in self.cluster.tasks() if task.startswith(tuple(names))), "")

    def test_a_node_killed_in_the_middle_loses_nothing(self):
        # 6 shards of 4 benchmarks.
        flags = self.flags(contexts="64,96,128", windows=8, benchmark_filter="kv_size|perplexity|error|needle")
        done = self.sweep("--out", self.dir, *flags, "--sbatch=--ntasks=1 --time=9")
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertIn("6 missing, submitted", done.stderr)
        self.assertIn(" 0 missing", self.sweep(self.dir).stderr)  # nothing twice
        # The cluster's arrays have 4 tasks at most, so there are two.
        self.assertEqual([first for job, first in self.jobs()], [0, 4])
        # One that waits is cancelled, by its owner or a limit: the sweep run again brings back this one.
        run("scancel", self.task(6).split()[0], environment=self.environment)
        wait_for("shard 6 cancelled", lambda: not self.task(6))
        self.assertIn(" 1 missing, submitted", self.sweep(self.dir).stderr)
        self.assertEqual([first for job, first in self.jobs()], [0, 4, 4])
        shard, there = self.kill_node("n2")
        before = json.loads(read(os.path.join(shard, "benchmarks.json")))["benchmarks"]
        self.assertEqual(len(before), there)
        line = 1 + [f"cell-{name}" for name in self.hashes()].index(os.path.basename(shard))
        # The controller takes 25 s to 90 s to see that a node is gone.
        waits = wait_for("the shard requeued", lambda: " PENDING " in self.task(line) and self.task(line), 180)
        at_kill = self.sweep("status", self.dir).stdout
        self.assertIn(f"pending    {there}/4  line {line}:", at_kill)
        self.assertIn(" 0 missing", self.sweep(self.dir).stderr)
        # Slurm begins a requeued task after two minutes.
        now = run("scontrol", "update", f"JobId={waits.split()[0]}", "StartTime=now",
                  environment=self.environment)
        self.assertEqual(now.returncode, 0, now.stderr)
        self.cluster.spawn("n2", "slurmd", "-D", "-N", "n2")
        wait_for("the end of the tasks", lambda: not self.cluster.tasks(), 120)
        self.assertEqual(self.sweep(self.dir).returncode, 0)
        stat = self.sweep("status", self.dir)
        self.assertEqual((stat.returncode, stat.stdout), (0, "6 shards: 6 done; 24 of 24 benchmarks\n"))
        # What was there is there, to the byte; only the rest was measured.
        after = json.loads(read(os.path.join(shard, "benchmarks.json")))
        self.assertEqual(after["benchmarks"][:there], before)
        self.assertEqual([past["resumed_after"] for past in after["history"]], [there])
        self.assertIn(f"has {there} of 4 benchmarks, the others follow", read(os.path.join(shard, "log.txt")))
        self.assertEqual(self.sweep("gather", self.dir).returncode, 0)
        gathered, whole = os.path.join(self.dir, "gathered", "benchmarks.json"), os.path.join(self.folder, "whole.json")
        self.assertEqual(run(KVQBENCH, *flags, f"--benchmark_out={whole}").returncode, 0)
        self.assertEqual(deterministic(gathered), deterministic(whole))
        fields = sum(len(entry) for entry in deterministic(whole)["benchmarks"])
        nodes = [re.findall(r"^job \S+ on (\w+),", read(os.path.join(self.dir, f"cell-{name}", "log.txt")), re.M)
                 for name in self.hashes()]
        self.assertEqual((nodes[line - 1][0], len(nodes[line - 1])), ("n2", 2))
        print(f"node n2 killed with {there} of 4 benchmarks of shard {line} there (then: {waits}); "
              f"nodes of each shard: {nodes}; {fields} fields of 24 benchmarks equal an uninterrupted run's")
        print(at_kill)


if __name__ == "__main__":
    if len(sys.argv) > 1 or NO_SLURM:
        unittest.main()
    with subprocess.Popen([sys.executable, __file__, "Slurm"]) as slurm:  # waits for half a minute: the others run beside it
        del Slurm
        others = unittest.main(exit=False).result.wasSuccessful()
    sys.exit(slurm.returncode or not others)
