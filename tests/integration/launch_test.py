#!/usr/bin/env python3
"""launch/run: what it decides, and that a job under it survives its ranks, stops when told and is never doubled."""
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import unittest
from unittest import mock

from program import (PROGRAM, ROOT, Folder, WithCorpus, checkpoints, last_update, losses, metrics, rank_processes, run,
                     wait_until, weights)

sys.dont_write_bytecode = True
sys.path.insert(0, str(ROOT / "launch"))

from supervisor import hosts, job, main, output, policy, probe, record, settings  # noqa: E402
from supervisor.codes import Refusal  # noqa: E402
from supervisor.hosts import Host  # noqa: E402
from supervisor.settings import Settings  # noqa: E402

LAUNCH = ROOT / "launch" / "run"
FOLDER = pathlib.Path("run")


class Scratch(Folder):
    """A temporary folder without a corpus."""

    def __enter__(self):
        self.path = pathlib.Path(tempfile.mkdtemp(prefix="normformer_test_"))
        return self.path


class Decisions(unittest.TestCase):
    def after(self, codes, max_restarts=10, progress=False, stop=False):
        """The decisions on jobs that end with these codes one after the other."""
        history = policy.History(max_restarts, 1.0)
        return [policy.after_job(history, code, stop, progress) for code in codes]

    def test_what_would_end_in_the_same_way_is_not_started_again(self):
        for code in (0, 64, 65, 75, 77):
            decision, = self.after([code])
            self.assertFalse(decision.restart, code)
            self.assertEqual(decision.code, code)
        for code in (1, 70, 74, 76, 78, 137, 139, 205):
            self.assertTrue(self.after([code])[0].restart, code)
        self.assertIn("ranks held different copies of the same weights", self.after([78])[0].reason)

    def test_what_libraries_are_told_reaches_other_hosts(self):
        environment = {"NCCL_DEBUG": "INFO", "NORMFORMER_LOG": "debug", "LD_LIBRARY_PATH": "/opt", "HOME": "/root",
                       "NORMFORMER": "x"}
        self.assertEqual(main.forwarded(environment), ["LD_LIBRARY_PATH", "NCCL_DEBUG", "NORMFORMER_ATTEMPT", "NORMFORMER_LAUNCHER",
                                                       "NORMFORMER_LOG", "NORMFORMER_TERMINAL"])

    def test_three_restarts_without_a_new_checkpoint_are_enough(self):
        decisions = self.after([137] * 4)
        self.assertEqual([d.restart for d in decisions], [True, True, True, False])
        self.assertEqual([d.pause for d in decisions[:3]], [1, 2, 4])
        self.assertEqual(decisions[3].code, 137)
        self.assertIn("no new checkpoint", decisions[3].reason)

    def test_with_new_checkpoints_the_restarts_are_counted(self):
        decisions = self.after([137] * 11, progress=True)
        self.assertEqual([d.restart for d in decisions], [True] * 10 + [False])
        self.assertEqual({d.pause for d in decisions[:10]}, {1})
        self.assertIn("--max-restarts", decisions[10].reason)

    def test_a_new_checkpoint_begins_the_count_anew(self):
        history = policy.History(10, 1.0)
        made = [False, False, False, True, False, False, False]
        decisions = [policy.after_job(history, 70, False, progress) for progress in made]
        self.assertEqual([d.restart for d in decisions], [True] * 6 + [False])
        self.assertEqual([d.pause for d in decisions[:6]], [1, 2, 4, 1, 2, 4])

    def test_without_supervision_nothing_is_started_again(self):
        decision, = self.after([137], max_restarts=0)
        self.assertEqual((decision.restart, decision.code), (False, 137))

    def test_a_stop_ends_the_supervision(self):
        for code, ends in ((75, 75), (0, 0), (137, 137), (128 + signal.SIGUSR1, 75)):
            decision, = self.after([code], stop=True)
            self.assertEqual((decision.restart, decision.code), (False, ends))

    def test_silent_hosts_are_waited_for_as_long_as_restarts_last(self):
        history = policy.History(8, 1.0)
        decisions = [policy.after_silence(history, "b did not answer") for _ in range(9)]
        self.assertEqual([d.pause for d in decisions[:8]], [1, 2, 4, 8, 16, 32, 60, 60])
        self.assertEqual((decisions[8].restart, decisions[8].code), (False, 69))
        self.assertIn("b did not answer", decisions[8].reason)

    def test_a_host_lost_twice_in_a_row_is_bad_until_there_is_a_checkpoint(self):
        history = policy.History(10, 1.0)
        for _ in range(2):
            self.assertFalse(history.is_bad("b"))
            policy.after_job(history, 205, False, False)
            history.note_losses(["b.example.org"])
        self.assertTrue(history.is_bad("b"))
        self.assertFalse(history.is_bad("a"))
        policy.after_job(history, 205, False, True)
        self.assertFalse(history.is_bad("b"))

    def test_addresses_are_not_cut_to_a_first_part(self):
        history = policy.History(10, 1.0, losses={"10.0.0.1": 2})
        self.assertTrue(history.is_bad("10.0.0.1"))
        self.assertFalse(history.is_bad("10.0.0.2"))


class Shapes(unittest.TestCase):
    def test_whole_replicas_stay(self):
        run_settings = Settings(FOLDER, tensor=2, pipeline=2)
        self.assertEqual(policy.shrink(run_settings, 16, 16), policy.Shape(16))
        self.assertEqual(policy.shrink(run_settings, 16, 20), policy.Shape(16))
        self.assertEqual(policy.shrink(run_settings, 16, 15), policy.Shape(12))
        self.assertEqual(policy.shrink(run_settings, 16, 4), policy.Shape(4))
        self.assertIsNone(policy.shrink(run_settings, 16, 3))

    def test_what_the_configuration_fixes_is_told_anew(self):
        run_settings = Settings(FOLDER, context=2, data=8, shard_group=4)
        self.assertEqual(policy.shrink(run_settings, 16, 12), policy.Shape(12, ("--set", "parallel.data=6")))
        self.assertEqual(policy.shrink(run_settings, 16, 10),
                         policy.Shape(10, ("--set", "parallel.data=5", "--set", "parallel.shard_group=2")))

    def test_ranks_fill_hosts_in_order(self):
        three = [Host("a", 4), Host("b", 4), Host("c", 4)]
        self.assertEqual(hosts.place(three, 6), [(three[0], 4), (three[1], 2)])
        self.assertEqual(policy.cores_per_rank(hosts.place(three, 6), {"a": 8, "b": 8}), 2)
        self.assertEqual(policy.cores_per_rank(hosts.place(three, 6), {"a": 8, "b": 1}), 0)
        self.assertEqual(policy.cores_per_rank(hosts.place(three, 6), {"a": 8}), 0)

    def options(self, cores, device="cpu", on=(Host("a", 2), Host("b", 2))):
        start = main.Start(on, policy.Shape(4), cores)
        return main.placement_options(start, Settings(FOLDER, device=device))

    def test_ranks_are_bound_where_each_can_have_a_core(self):
        self.assertEqual(self.options({"a": 8, "b": 6}),
                         ["--host", "a:2,b:2", "--map-by", "slot:PE=3", "--bind-to", "core"])
        self.assertEqual(self.options({"a": 8, "b": 6}, "cuda"), ["--host", "a:2,b:2", "--bind-to", "none"])
        self.assertIn("--oversubscribe", self.options({"a": 8, "b": 1}))
        self.assertNotIn("core", self.options({"a": 8, "b": 1}))
        self.assertNotIn("--host", self.options({"": 4}, on=()))


class Reading(unittest.TestCase):
    def test_hosts(self):
        self.assertEqual(hosts.parse_hosts("a:8,b,a:2"), (Host("a", 10), Host("b", 1)))
        self.assertEqual(hosts.tasks_per_node("2(x3),1"), [2, 2, 2, 1])
        for wrong in ("a:0", "a:x", ",", "a:8:2"):
            self.assertRaises(Refusal, hosts.parse_hosts, wrong)

    def test_hostfile(self):
        with Scratch() as folder:
            path = folder / "hosts"
            path.write_text("# two\na slots=4 max_slots=8\n\nb.example.org\n")
            self.assertEqual(hosts.read_hostfile(path), (Host("a", 4), Host("b.example.org", 0)))
            for wrong in ("", "a slots=x\n", "a b\n"):
                path.write_text(wrong)
                self.assertRaises(Refusal, hosts.read_hostfile, path)
            self.assertRaises(Refusal, hosts.read_hostfile, folder / "none")

    def test_settings(self):
        with Scratch() as folder:
            path = folder / "c.toml"
            path.write_text('[parallel]\ntensor = 2\n[data]\ntrain = [{ prefix = "x", weight = 2 }, "y"]\n'
                            'valid = "v"\n[checkpoint]\nfolder = "runs/a"\n')
            plain = settings.read_settings(path)
            self.assertEqual(plain, Settings(pathlib.Path("runs/a"), tensor=2, datasets=("x", "y", "v")))
            changed = settings.read_settings(path, ["--resume", "--set", "checkpoint.folder=runs/b",
                                                    "--set=parallel.data=3", "--set", 'device.kind="cuda"'])
            self.assertEqual(changed, Settings(pathlib.Path("runs/b"), "cuda", tensor=2, data=3,
                                               datasets=("x", "y", "v")))
            over = folder / "over.toml"
            over.write_text("[parallel]\ntensor = 4\npipeline = 2\n")
            overlaid = settings.read_settings(path, ["--set", f"@{over}", "--set", "parallel.pipeline=3"])
            self.assertEqual((overlaid.tensor, overlaid.pipeline, overlaid.folder), (4, 3, pathlib.Path("runs/a")))
            self.assertEqual(settings.overlays_of(["--set", "@a.toml", "--resume", "--set=@b", "--set", "x.y=@c"]),
                             ["a.toml", "b"])
            path.write_text("[parallel\n")
            self.assertRaises(Refusal, settings.read_settings, path)

    def test_newest_checkpoint(self):
        names = ["step-0000000009", "step-0000000010", "step-0000000010-2", ".tmp-step-0000000011", "ATTEMPT",
                 "set-aside-step-0000000012"]
        self.assertEqual(record.newest_checkpoint(names), "step-0000000010-2")
        self.assertIsNone(record.newest_checkpoint(["ATTEMPT"]))

    def test_lost_hosts(self):
        said = ["ORTE has lost communication with a remote daemon.", "", "  HNP daemon   : [[31036,0],0] on node vm",
                "  Remote daemon: [[31036,0],2] on node b", "  Remote daemon: [[31036,0],2] on node b"]
        self.assertEqual(job.lost_hosts(said), ("b",))

    def test_tags_split_at_any_byte(self):
        stream = (b"[1,0]<stdout>:start\n[1,0]<stdout>:\rstep 1[1,12]<stdout>:one\nmpirun [1 says\n"
                  b"[1,0]<stdout>:\rstep 2[1,0]<stdout>: done\n[1,3]<stdout>:no end")
        whole = {0: b"start\n\rstep 1\rstep 2 done\n", 12: b"one\n", None: b"mpirun [1 says\n", 3: b"no end"}
        rng = random.Random(5)
        for _ in range(200):
            splitter, got, rest = output.TagSplitter(), {}, stream
            while rest:
                at = rng.randrange(1, 9)
                for rank, text in splitter.feed(rest[:at]):
                    got[rank] = got.get(rank, b"") + text
                rest = rest[at:]
            for rank, text in splitter.feed(b"", at_end=True):
                got[rank] = got.get(rank, b"") + text
            self.assertEqual(got, whole)

    def test_what_is_shown_and_logged(self):
        self.assertEqual(output.shown(0, b"x\n"), b"x\n")
        self.assertEqual(output.shown(3, b"x\n"), b"[rank 3] x\n")
        self.assertEqual(output.shown(3, b"[rank 3 host a] x\n"), b"[rank 3 host a] x\n")
        self.assertEqual(output.logged(b"\rstep 1\rstep 2\r\033[Kdone\n"), b"done\n")


class Hosts(unittest.TestCase):
    FACTS = {"cores": "8", "program /p": "1", "configuration c.toml": "2", "data d.idx": "5 3", "data d.bin": "9"}

    def differences(self, **facts):
        other = probe.Report("b", {**self.FACTS, **{key.replace("_", " "): value for key, value in facts.items()}})
        return probe.differences([probe.Report("a", self.FACTS), other, probe.Report("c", {}, "did not answer")])

    def test_equal_hosts_have_no_differences(self):
        self.assertEqual(self.differences(cores="4"), [])

    def test_each_difference_is_a_sentence(self):
        self.assertEqual(self.differences(**{"program /p": "7"}), ["b has another build of the program than a in /p"])
        self.assertEqual(self.differences(**{"configuration c.toml": "7"}), ["b has another configuration than a in c.toml"])
        self.assertEqual(self.differences(**{"data d.idx": "5 4", "data d.bin": "missing"}),
                         ["b has other data than a in d.idx", "b has no d.bin, which a has"])

    def test_the_script_tells_what_is_there(self):
        with Scratch() as folder:
            for name, text in (("p", "program"), ("c", "config"), ("d.idx", "index"), ("d.bin", "tokens")):
                (folder / name).write_text(text)
            done = subprocess.run(["sh", "-c", probe.SCRIPT, "probe", folder / "p", folder / "c", folder / "o", "--",
                                   folder / "d.bin", folder / "e"], capture_output=True, text=True)
            facts = probe.read_facts("Welcome!\n" + done.stdout)
            self.assertRegex(facts[f"program {folder}/p"], "^[0-9a-f]{64}$")
            self.assertRegex(facts[f"configuration {folder}/c"], "^[0-9a-f]{64}$")
            self.assertEqual(facts[f"configuration {folder}/o"], "missing")
            self.assertRegex(facts[f"data {folder}/d.idx"], "^5 [0-9a-f]{64}$")
            self.assertEqual(facts[f"data {folder}/d.bin"], "6")
            self.assertEqual(facts[f"data {folder}/e.bin"], "missing")
            self.assertGreater(int(facts["cores"]), 0)


class Starts(unittest.TestCase):
    """Where the next attempt runs, by what the hosts have answered."""

    def start_on(self, *answering, elastic=True, ranks=4, lost=()):
        arguments = ["c.toml", "-n", str(ranks), "--hosts", "a:2,b:2", *(["--elastic"] if elastic else [])]
        supervisor = main.Supervisor(main.parse_options(arguments), Settings(FOLDER, tensor=2), None, None, "program")
        supervisor._history.losses = {host: 2 for host in lost}
        reports = [probe.Report(host, {"cores": "4"} if host in answering else {},
                                "" if host in answering else "did not answer") for host in ("a", "b")]
        return supervisor._start_on(reports)

    def names(self, begun):
        return [host.name for host in begun.hosts], begun.shape.ranks

    def test_all_hosts_that_answer_are_used(self):
        self.assertEqual(self.names(self.start_on("a", "b")), (["a", "b"], 4))
        self.assertEqual(self.names(self.start_on("b")), (["b"], 2))
        self.assertEqual(self.start_on("b", elastic=False), "a did not answer")
        self.assertRegex(self.start_on(), "a did not answer; b did not answer; a replica takes 2 ranks, .* have 0")

    def test_a_host_lost_again_and_again_is_done_without(self):
        self.assertEqual(self.names(self.start_on("a", "b", lost=["a"])), (["b"], 2))
        self.assertEqual(self.names(self.start_on("a", "b", lost=["a"], elastic=False)), (["a", "b"], 4))

    def test_too_few_slots_are_refused(self):
        self.assertRaisesRegex(Refusal, "the hosts take 4 ranks, not 6", self.start_on, "a", "b", ranks=6)


class Programs(unittest.TestCase):
    """Which program ranks run, by the run's device and by what is built."""

    def setUp(self):
        self.folder = Scratch().__enter__()
        self.addCleanup(shutil.rmtree, self.folder)

    def make(self, name):
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("#!/bin/sh\n")
        path.chmod(0o755)
        return str(path)

    def found(self, device, named=None):
        variables = {"PATH": str(self.folder / "bin"), **({"NORMFORMER": named} if named else {})}
        with mock.patch.object(main, "ROOT", self.folder), mock.patch.dict(os.environ, variables):
            if not named:
                os.environ.pop("NORMFORMER", None)
            return main.find_program(device)

    def test_the_build_for_the_device_comes_first(self):
        self.assertRaisesRegex(Refusal, "cmake --preset cuda", self.found, "cuda")
        self.assertRaisesRegex(Refusal, "cmake --preset cpu", self.found, "cpu")
        on_path = self.make("bin/normformer")
        self.assertEqual([self.found("cpu"), self.found("cuda")], [on_path] * 2)
        cuda = self.make("build/cuda/src/app/normformer")
        self.assertEqual([self.found("cpu"), self.found("cuda")], [cuda] * 2)
        cpu = self.make("build/cpu/src/app/normformer")
        self.assertEqual([self.found("cpu"), self.found("cuda")], [cpu, cuda])
        os.chmod(cuda, 0o644)
        self.assertEqual([self.found("cpu"), self.found("cuda")], [cpu] * 2)

    def test_the_one_that_is_named_outranks_all(self):
        for name in ("bin/normformer", "build/cuda/src/app/normformer", "build/cpu/src/app/normformer"):
            self.make(name)
        named = self.make("other/program")
        self.assertEqual([self.found("cpu", named), self.found("cuda", named)], [named] * 2)
        self.assertRaisesRegex(Refusal, "NORMFORMER=nowhere is no program", self.found, "cuda", "nowhere")


class Records(unittest.TestCase):
    def test_attempts_are_numbered_on(self):
        with Scratch() as folder:
            kept = record.RunRecord(folder / "run")
            self.assertEqual([kept.begin_attempt(), kept.begin_attempt()], [1, 2])
            self.assertEqual((folder / "run" / "checkpoints" / "ATTEMPT").read_text(), "2\n")
            kept.write_line(attempt=7)
            with open(folder / "run" / "attempts.jsonl", "a") as file:
                file.write('{"attempt": 9')
            kept.write_line(attempt=8)
            self.assertEqual([line["attempt"] for line in kept.lines()], [7, 8])
            (folder / "run" / "checkpoints" / "ATTEMPT").write_text("")
            self.assertEqual(kept.begin_attempt(), 9)
            kept.close()


def fake(folder, text):
    """A shell script in the program's place."""
    path = folder / "fake"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


started = []


def start(config, ranks, *options, program=PROGRAM):
    launch = subprocess.Popen([LAUNCH, config, "-n", str(ranks), "--restart-pause", "0.05", *map(str, options)],
                              env=dict(os.environ, NORMFORMER=str(program)), stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, text=True, errors="replace")
    started.append(launch)
    return launch


def ended(process, timeout=120):
    """The exit code of launch/run and what it printed."""
    text, _ = process.communicate(timeout=timeout)
    return process.returncode, text


class Jobs(WithCorpus):
    def tearDown(self):
        """What a failed test has left running goes, its job with it."""
        while started:
            launch = started.pop()
            if launch.poll() is None:
                launch.kill()
                launch.communicate()

    def attempts(self, name):
        text = (self.folder.path / name / "attempts.jsonl").read_text()
        return [line for line in map(json.loads, text.splitlines()) if line["event"] == "end"]

    def test_a_killed_rank_changes_no_bit(self):
        changes = dict(train__updates=1500, checkpoint__every=50, train__log_every=1000, parallel__data=2)
        straight = self.folder.config("straight", **changes)
        run(["train", straight], 2, expect=0)
        config = self.folder.config("killed", **changes)
        launch = start(config, 2)
        for kill_at, rank in ((120, 1), (500, 0)):
            reached = wait_until(lambda: any(step >= kill_at for step in checkpoints(self.folder.path / "killed"))
                                 and len(rank_processes(config)) == 2)
            self.assertTrue(reached)
            os.kill(rank_processes(config)[rank], signal.SIGKILL)
        code, text = ended(launch)
        self.assertEqual(code, 0, text)
        self.assertEqual([attempt["code"] for attempt in self.attempts("killed")], [137, 137, 0], text)
        self.assertIn("SIGKILL", text)
        self.assertEqual(losses(self.folder.path / "killed"), losses(self.folder.path / "straight"))
        self.assertEqual(weights(self.folder.path / "killed"), weights(self.folder.path / "straight"))

    def test_a_configuration_that_cannot_run_is_not_tried_again(self):
        code, text = ended(start(self.folder.config("bad", parallel__tensor=5), 2))
        self.assertEqual(code, 64, text)
        self.assertEqual([attempt["code"] for attempt in self.attempts("bad")], [64])
        broken = self.folder.path / "broken.toml"
        broken.write_text("[model\n")
        code, text = ended(start(broken, 2))
        self.assertEqual(code, 64, text)
        self.assertIn("broken.toml is no TOML", text)
        self.assertEqual(ended(start(self.folder.path / "none.toml", 2))[0], 64)

    def test_a_wrong_command_line_gets_one_sentence(self):
        config = self.folder.config("usage")
        for options in (["--max-restarts", "x"], ["--hosts", "a:0"], ["--hosts", "a", "--hostfile", "b"], ["--what"]):
            code, text = ended(start(config, 2, *options))
            self.assertEqual(code, 64, text)
            self.assertEqual(sum(line.startswith("launch/run:") for line in text.splitlines()), 1, text)

    def test_a_stop_saves_and_ends_with_75(self):
        config = self.folder.config("stopped", train__updates=1000000)
        launch = start(config, 2)
        self.assertTrue(wait_until(lambda: last_update(self.folder.path / "stopped") > 0))
        launch.send_signal(signal.SIGINT)
        code, text = ended(launch)
        self.assertEqual(code, 75, text)
        update = last_update(self.folder.path / "stopped")
        self.assertEqual(checkpoints(self.folder.path / "stopped"), [update])
        code, text = ended(start(config, 2, "--", "--resume", "--set", f"train.updates={update + 3}"))
        self.assertEqual(code, 0, text)
        self.assertEqual([line["update"] for line in metrics(self.folder.path / "stopped") if line["kind"] == "step"],
                         list(range(1, update + 4)))

    def test_every_request_to_stop_reaches_every_rank_as_sigusr1(self):
        stops = fake(self.folder.path, "trap 'exit 75' USR1; echo ready; while :; do sleep 0.05; done")
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
            config = self.folder.config(f"asked{number}")
            launch = start(config, 2, program=stops)
            self.wait_for_ranks(launch, 2)
            launch.send_signal(number)
            code, text = ended(launch)
            self.assertEqual(code, 75, text)
            self.assertEqual([attempt["code"] for attempt in self.attempts(f"asked{number}")], [75])

    def test_a_stop_between_two_attempts_ends_with_75(self):
        config = self.folder.config("between")
        launch = start(config, 1, "--restart-pause", 60, program=fake(self.folder.path, "exit 70"))
        while "trying again in 60 s" not in launch.stdout.readline():
            pass
        launch.send_signal(signal.SIGTERM)
        self.assertEqual(ended(launch)[0], 75)

    def wait_for_ranks(self, launch, ranks):
        """Reads until so many ranks have said that they are ready."""
        while ranks > 0:
            line = launch.stdout.readline()
            self.assertTrue(line)
            ranks -= line.endswith("ready\n")

    def test_a_second_stop_ends_at_once(self):
        config = self.folder.config("twice")
        deaf = fake(self.folder.path, "trap '' USR1 TERM; echo ready; while :; do sleep 0.1; done")
        launch = start(config, 2, program=deaf)
        self.wait_for_ranks(launch, 2)
        for _ in range(2):
            launch.send_signal(signal.SIGINT)
            launch.stdout.readline()
        self.assertEqual(ended(launch)[0], 130)
        self.assertEqual(rank_processes(config, deaf), {})

    def test_a_folder_has_one_supervisor(self):
        config = self.folder.config("locked")
        waits = fake(self.folder.path, "echo ready; exec sleep 1000")
        launch = start(config, 2, program=waits)
        self.wait_for_ranks(launch, 2)
        code, text = ended(start(config, 2, program=waits))
        self.assertEqual(code, 64, text)
        self.assertIn(f"another launch/run (process {launch.pid} on ", text)
        # Its job goes with it, and only then leaves the folder free.
        launch.send_signal(signal.SIGKILL)
        launch.communicate()
        self.assertTrue(wait_until(lambda: ended(start(config, 1, program="true"))[0] == 0))

    def test_a_job_that_was_replaced_publishes_no_checkpoint(self):
        folder = self.folder.path / "replaced"
        launch = start(self.folder.config("replaced", train__updates=1000000, checkpoint__every=10), 2)

        def wait_for_saves(count):
            """Waits until so many more checkpoints are due."""
            update = last_update(folder) + 10 * count
            self.assertTrue(wait_until(lambda: last_update(folder) >= update))

        self.assertTrue(wait_until(lambda: checkpoints(folder)))
        record.write_durably(folder / "checkpoints" / "ATTEMPT", "2\n")
        wait_for_saves(3)  # one may have been under way
        published = checkpoints(folder)
        wait_for_saves(3)
        self.assertEqual(checkpoints(folder), published)
        launch.send_signal(signal.SIGINT)
        code, text = ended(launch)
        self.assertIn("says that attempt 2 of this run has begun", text)
        self.assertIn("leaving the run to it", text)
        self.assertEqual(checkpoints(folder), published)
        self.assertEqual((folder / "checkpoints" / "ATTEMPT").read_text(), "2\n")
        self.assertNotEqual(code, 0)

    def test_it_gives_up_where_nothing_is_gained(self):
        config = self.folder.config("hopeless")
        code, text = ended(start(config, 1, program=fake(self.folder.path, 'echo "$@"; exit 70')))
        self.assertEqual(code, 70, text)
        self.assertEqual([attempt["code"] for attempt in self.attempts("hopeless")], [70] * 4)
        self.assertEqual(text.splitlines().count(f"train {config} --resume"), 3, text)
        self.assertEqual((self.folder.path / "hopeless" / "checkpoints" / "ATTEMPT").read_text(), "4\n")

    def test_ranks_are_told_apart_and_know_their_attempt(self):
        config = self.folder.config("output")
        says = fake(self.folder.path, 'echo "attempt $NORMFORMER_ATTEMPT"; echo "complains" >&2')
        code, text = ended(start(config, 3, program=says))
        self.assertEqual(code, 0, text)
        self.assertEqual(sorted(line for line in text.splitlines() if not line.startswith("launch/run:")),
                         ["[rank 1] attempt 1", "[rank 1] complains", "[rank 2] attempt 1", "[rank 2] complains",
                          "attempt 1", "complains"])
        for rank in range(3):
            logged = (self.folder.path / "output" / "logs" / "attempt-001" / f"rank.{rank}").read_text()
            self.assertEqual(sorted(logged.splitlines()), ["attempt 1", "complains"])

    def test_a_request_to_save_reaches_every_rank(self):
        config = self.folder.config("asked")
        saves = fake(self.folder.path, "trap 'echo saved; exit 0' USR2; echo ready; while :; do sleep 0.05; done")
        launch = start(config, 2, program=saves)
        self.wait_for_ranks(launch, 2)
        launch.send_signal(signal.SIGUSR2)
        code, text = ended(launch)
        self.assertEqual(code, 0, text)
        self.assertEqual(sum(line.endswith("saved") for line in text.splitlines()), 2, text)

    def test_each_rank_has_cores_of_its_own_where_there_are_enough(self):
        here = probe.probe_here()
        if here.bindable_cores == 0:
            self.skipTest("this process may use only some of the processors")
        config = self.folder.config("bound")
        says = fake(self.folder.path, "taskset -cp $$ | sed 's/.*: //'")
        cores = here.bindable_cores
        for ranks in (1, cores, cores + 1):
            code, text = ended(start(config, ranks, program=says))
            self.assertEqual(code, 0, text)
            masks = [line.split()[-1] for line in text.splitlines() if not line.startswith("launch/run:")]
            self.assertEqual(len(masks), ranks, text)
            self.assertEqual(len(set(masks)), ranks if ranks <= cores else 1, text)


if __name__ == "__main__":
    unittest.main(verbosity=2)
