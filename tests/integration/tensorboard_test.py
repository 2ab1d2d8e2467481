"""The event files of a run, read by itself and, where it is installed, by TensorBoard."""
import importlib.util
import json
import os
import pathlib
import shutil
import struct
import unittest

from program import WithCorpus, checkpoints, metrics, run

TABLE = []
for byte in range(256):
    for _ in range(8):
        byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
    TABLE.append(byte)


def masked_crc(data):
    """CRC-32C as TFRecord files have it, after RFC 3720."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = TABLE[(crc ^ byte) & 255] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def records(path):
    """The data of a file's whole records."""
    data, at = path.read_bytes(), 0
    while at + 12 <= len(data):
        length, crc = struct.unpack_from("<QI", data, at)
        assert crc == masked_crc(data[at:at + 8])
        body, rest = data[at + 12:at + 12 + length], data[at + 12 + length:at + 16 + length]
        if len(rest) < 4:
            return
        assert struct.unpack("<I", rest)[0] == masked_crc(body)
        yield body
        at += length + 16


def varint(data, at):
    value, shift = 0, 0
    while True:
        value |= (data[at] & 127) << shift
        shift, at = shift + 7, at + 1
        if data[at - 1] < 128:
            return value, at


def fields(data):
    """[(number, value)] of a Protocol Buffers message; values are integers or bytes."""
    found, at = [], 0
    while at < len(data):
        key, at = varint(data, at)
        if key & 7 == 0:
            value, at = varint(data, at)
        else:
            size, at = {1: (8, at), 5: (4, at)}.get(key & 7) or varint(data, at)
            value, at = data[at:at + size], at + size
        found.append((key >> 3, value))
    return found


def summary_values(event):
    """The values of an event's summary, each {field: value}."""
    return [dict(fields(value)) for number, summary in fields(event) if number == 5 for _, value in fields(summary)]


def scalars(event):
    """{tag: value} of an event."""
    return {parts[1].decode(): struct.unpack("<f", parts[2])[0] for parts in summary_values(event) if 2 in parts}


def event_files(folder):
    return sorted((pathlib.Path(folder) / "tensorboard").iterdir())


def as_float(value):
    return struct.unpack("<f", struct.pack("<f", value))[0]


KEYS = {"training/loss": "loss", "training/gradient_norm": "gradient_norm", "training/lr": "lr",
        "speed/tokens_per_second": "tokens_per_second", "speed/flops_per_second": "flops_per_second"}


class TensorBoardFiles(WithCorpus):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.path = cls.folder.path / "watched"
        config = cls.folder.config("watched", train__updates=9, train__valid_every=3, checkpoint__every=5,
                                   metrics__distributions_every=3)
        run(["train", config], expect=0)
        assert checkpoints(cls.path) == [5, 9]
        for name in os.listdir(cls.path / "checkpoints"):
            if name.startswith("step-") and int(name.removeprefix("step-").partition("-")[0]) == 9:
                shutil.rmtree(cls.path / "checkpoints" / name)
        run(["train", config, "--resume"], expect=0)
        with open(event_files(cls.path)[-1], "ab") as file:
            file.write(b"\x40\0\0\0")  # what a killed run may leave

    def of_kind(self, kind):
        return [line for line in metrics(self.path) if line["kind"] == kind]

    def test_each_start_says_from_where_it_counts(self):
        for file, step in zip(event_files(self.path), (1, 6), strict=True):
            version, start, *_ = map(fields, records(file))
            self.assertEqual(dict(version)[3], b"brain.Event:2")
            self.assertEqual(dict(start)[2], step)
            self.assertEqual(dict(start)[7], b"\x08\x01")

    def test_scalars_are_those_of_the_metrics(self):
        first, second = ({dict(fields(event)).get(2): scalars(event) for event in records(file)
                          if "training/loss" in scalars(event)} for file in event_files(self.path))
        self.assertEqual(sorted(first), list(range(1, 10)))
        self.assertEqual(sorted(second), list(range(6, 10)))
        for line in self.of_kind("step"):
            values = {**first, **second}[line["update"]]
            for tag, key in KEYS.items():
                self.assertEqual(values[tag], as_float(line[key]), (tag, line["update"]))

    def test_no_start_says_anything_twice(self):
        for file in event_files(self.path):
            said = [(dict(fields(event)).get(2, 0), parts[1].decode())
                    for event in records(file) for parts in summary_values(event)]
            self.assertEqual(len(said), len(set(said)))
            self.assertTrue(any(tag.startswith("distributions/") for _, tag in said))

    def test_none_are_written_where_none_are_wanted(self):
        config = self.folder.config("unwatched", train__updates=1, metrics__tensorboard="false")
        run(["train", config], expect=0)
        self.assertFalse((self.folder.path / "unwatched" / "tensorboard").exists())

    @unittest.skipUnless(importlib.util.find_spec("tensorboard"), "tensorboard is not installed (pip install tensorboard)")
    def test_tensorboard_reads_each_update_once(self):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
        from tensorboard.util import tensor_util
        read = EventAccumulator(str(self.path / "tensorboard"), size_guidance={"tensors": 0, "scalars": 0}).Reload()
        values = {tag: [(event.step, event.value) for event in read.Scalars(tag)]
                  for tag in [*KEYS, "validation/loss", "validation/perplexity"]}
        for tag, key in KEYS.items():
            self.assertEqual(values[tag], [(line["update"], as_float(line[key])) for line in self.of_kind("step")], tag)
        for key in ("loss", "perplexity"):
            self.assertEqual(values[f"validation/{key}"],
                             [(line["update"], as_float(line[key])) for line in self.of_kind("validation")])
        text = tensor_util.make_ndarray(read.Tensors("config")[-1].tensor_proto).item().decode()
        self.assertEqual(text, f"```toml\n{(self.path / 'config.toml').read_text()}\n```")

    @unittest.skipUnless(importlib.util.find_spec("tensorboard"), "tensorboard is not installed (pip install tensorboard)")
    def test_tensorboard_reads_the_recorded_distributions(self):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
        recorded = self.path / "statistics.jsonl"
        if not recorded.exists():
            self.skipTest("the run recorded no statistics")
        read = EventAccumulator(str(self.path / "tensorboard"), size_guidance={"histograms": 0}).Reload()
        lines = [line for line in map(json.loads, recorded.read_text().splitlines()) if line["kind"] == "distributions"]
        self.assertTrue(lines)
        for name in lines[-1]["parameters"]:
            events = read.Histograms(f"distributions/{name}")
            self.assertEqual([event.step for event in events], [line["update"] for line in lines])
            for event, line in zip(events, lines):
                told, values = event.histogram_value, line["parameters"][name]
                self.assertEqual((told.min, told.max, told.num), (values["min"], values["max"], values["count"]))
                self.assertEqual(list(told.bucket_limit), values["bins"][1:])
                self.assertEqual(list(told.bucket), values["counts"])


if __name__ == "__main__":
    unittest.main()
