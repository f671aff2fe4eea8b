"""tokenize_test.py TOKENIZE: the program from the outside. Oracles: tiktoken and sentencepiece, on models that the test makes."""

import base64
import collections
import importlib.util
import pathlib
import random
import struct
import subprocess
import sys
import tempfile
import unicodedata
import unittest

TOKENIZE = sys.argv.pop()
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
SEED = 20261124


def has(module):
    return importlib.util.find_spec(module) is not None


def unicode_text(size, seed=SEED):
    """Words, digits, white space of all kinds, accents, emoji, CJK, contractions, long runs. Any character that old and new Unicode
    tables call the same: where they differ (a letter of Unicode 15 is no letter to PCRE2 10.42), so do the tokenizers."""
    generator = random.Random(seed)
    old = unicodedata.ucd_3_2_0.category
    known = [c for c in map(chr, range(1, 0x110000)) if old(c) not in ("Cn", "Cs") and old(c) == unicodedata.category(c)]
    pieces = ["the", " of", " Straße", "'s", "'ll", "  ", "\n\n", "\t", "\u00a0", "\u3000", "2026", " ½", "é", "e\u0301", "漢字", "🙂", "👩‍👩‍👧", " ...", "—", "\r\n", "x" * 50, "\u200b", "Ωmega", "عربي"]
    parts, have = [], 0
    while have < size:
        kind = generator.random()
        part = generator.choice(pieces) if kind < 0.8 else generator.choice(known)
        parts.append(part)
        have += len(part.encode())
    return "".join(parts)


def train_ranks(text, merges):
    """Byte pairs by frequency over the text's chunks of letters: enough of a vocabulary to merge with."""
    ranks = {bytes([i]): i for i in range(256)}
    words = collections.Counter(tuple(bytes([b]) for b in word.encode()) for word in text.split(" ") if len(word) < 60)
    for _ in range(merges):
        pairs = collections.Counter()
        for word, count in words.items():
            for pair in zip(word, word[1:]):
                if pair[0] + pair[1] not in ranks:
                    pairs[pair] += count
        if not pairs:
            break
        best = pairs.most_common(1)[0][0]
        ranks[best[0] + best[1]] = len(ranks)
        merged = collections.Counter()
        for word, count in words.items():
            out = []
            for piece in word:
                if out and (out[-1], piece) == best:
                    out[-1] += piece
                else:
                    out.append(piece)
            merged[tuple(out)] += count
        words = merged
    return ranks


def read_tokens(path):
    data = path.read_bytes()
    magic, version, count = struct.unpack_from("<3i", data)
    assert (magic, version) in ((20240520, 1), (20240801, 7)), (magic, version)
    assert data[12:1024] == bytes(1012)
    width = 2 if version == 1 else 4
    assert len(data) == 1024 + width * count
    return list(struct.unpack_from(f"<{count}{'H' if width == 2 else 'I'}", data, 1024))


class Tokenize(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name)

    def run_program(self, *words, code=0):
        done = subprocess.run([TOKENIZE, *map(str, words)], capture_output=True, text=True, timeout=60)
        self.assertEqual(done.returncode, code, done.stdout + done.stderr)
        return done.stdout + done.stderr

    def write(self, name, data):
        path = self.folder / name
        path.write_bytes(data.encode() if isinstance(data, str) else data)
        return path

    def write_ranks(self, ranks):
        return self.write("ranks", "".join(f"{base64.b64encode(piece).decode()} {rank}\n" for piece, rank in ranks.items()))

    def encode(self, *flags, files):
        self.run_program(*flags, "--output", f"{self.folder}/out/", *files)
        return read_tokens(self.folder / "out/train.bin")

    def test_bytes_are_their_own_ids_in_the_order_of_the_files(self):
        one, two = self.write("b", bytes(range(256))), self.write("a", "zwei")
        self.assertEqual(self.encode(files=[one, two]), list(range(256)) + list(b"zwei"))

    def test_the_last_part_is_held_out_and_nothing_else_is_left(self):
        text = self.write("text", bytes(i % 251 for i in range(1001)))
        train = self.encode("--validation_fraction=0.05", files=[text])
        validation = read_tokens(self.folder / "out/validation.bin")
        self.assertEqual(len(validation), 50)
        self.assertEqual(train + validation, list(text.read_bytes()))
        self.assertEqual(sorted(p.name for p in (self.folder / "out").iterdir()), ["train.bin", "validation.bin"])

    @unittest.skipUnless(has("tiktoken"), "tiktoken is not installed; cmake/setup.sh test installs it")
    def test_gpt2_agrees_with_tiktoken_on_a_megabyte_of_any_unicode(self):
        import tiktoken

        ranks = train_ranks(unicode_text(100_000, SEED + 1), 300)
        oracle = tiktoken.Encoding("test", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})
        text = unicode_text(1_000_000)
        ids = self.encode("--tokenizer=gpt2", "--model", self.write_ranks(ranks), files=[self.write("text", text)])
        self.assertEqual(ids[0], len(ranks))  # a document begins with end of text
        expected = oracle.encode_ordinary(text)
        differ = next((i for i, (ours, theirs) in enumerate(zip(ids[1:], expected)) if ours != theirs), None)
        self.assertEqual((differ, len(ids) - 1), (None, len(expected)), f"seed {SEED}")

    def test_a_document_begins_with_end_of_text_and_long_runs_take_no_quadratic_time(self):
        ranks = {bytes([i]): i for i in range(256)} | {b"aa": 256, b"aaaa": 257}
        ranks_file = self.write_ranks(ranks)
        run, spaces = self.write("run", "a" * 1_000_003), self.write("spaces", " " * 300_000)
        ids = self.encode("--tokenizer=gpt2", "--model", ranks_file, files=[run, spaces])
        self.assertEqual(ids, [258] + [257] * 250_000 + [256, 97] + [258] + [32] * 300_000)

    @unittest.skipUnless(has("sentencepiece"), "sentencepiece is not installed; cmake/setup.sh test installs it")
    def test_sentencepiece_agrees_with_its_own_python_package(self):
        import sentencepiece

        words = [f"{a}{b}{c}" for a in ("lo", "mi", "ra", "tu") for b in ("ck", "st", "p") for c in ("en", "ing", "s", "")]
        generator = random.Random(SEED)
        text = "\n".join(" ".join(generator.choice(words) for _ in range(12)) for _ in range(2000))
        corpus = self.write("text", text)
        sentencepiece.SentencePieceTrainer.train(input=str(corpus), model_prefix=str(self.folder / "m"), vocab_size=60, model_type="bpe", byte_fallback=False, minloglevel=2)
        oracle = sentencepiece.SentencePieceProcessor(model_file=str(self.folder / "m.model"))
        ids = self.encode("--tokenizer=sentencepiece", "--model", self.folder / "m.model", files=[corpus])
        self.assertEqual(ids, [oracle.eos_id()] + oracle.encode(text))

    def test_what_a_person_can_mend_ends_with_78_and_says_how(self):
        text, empty = self.write("text", "hello"), self.write("empty", "")
        out = f"--output={self.folder}/out/"
        for words in (
            [],
            [text],
            [out],
            [out, self.folder / "absent"],
            [out, self.folder],
            [out, empty],
            [out, "--tokenizer=words", text],
            [out, "--tokenizer=gpt2", text],
            [out, "--tokenizer=gpt2", f"--model={self.folder}/absent", text],
            [out, "--tokenizer=sentencepiece", f"--model={self.folder}/absent", text],
            [out, "--validation_fraction=1", text],
            [out, "--validation_fraction=nan", text],
            [out, "--no_such_flag", text],
        ):
            said = self.run_program(*words, code=78)
            self.assertTrue(said.startswith("tokenize: "), said)
        self.assertFalse((self.folder / "out").exists())
        self.assertIn("--tokenizer", self.run_program("--help"))

    def test_bad_data_ends_with_65_names_the_place_and_writes_nothing(self):
        ranks = {bytes([i]): i for i in range(256)}
        good, out = self.write_ranks(ranks), f"--output={self.folder}/out/"
        text = self.write("text", b"good \xff bad")
        said = self.run_program(out, "--tokenizer=gpt2", "--model", good, text, code=65)
        self.assertIn("not valid UTF-8 at byte 5", said)
        self.assertIn(str(text), said)
        whole = good.read_text()
        for broken in ("", "AA== 0\n", "????  1\n" + whole, whole + "AA== 256\n", whole.replace(" 77\n", " 78\n"), whole + "YWE= x\n"):
            self.run_program(out, "--tokenizer=gpt2", "--model", self.write("broken", broken), text, code=65)
        self.assertFalse((self.folder / "out").exists())

    def test_a_failed_write_ends_with_74_and_keeps_what_was_there(self):
        text, out = self.write("text", "x" * 100_000), self.folder / "out"
        self.encode(files=[text])
        before = (out / "train.bin").read_bytes()
        script = 'ulimit -f 100; trap "" XFSZ; exec "$@"'  # files end at 100 KiB: writes past it fail
        done = subprocess.run(["bash", "-c", script, "-", TOKENIZE, f"--output={out}/", str(text)], capture_output=True, text=True, timeout=60)
        self.assertEqual(done.returncode, 74, done.stdout + done.stderr)
        self.assertEqual((out / "train.bin").read_bytes(), before)
        self.assertEqual([p.name for p in out.iterdir()], ["train.bin"])


unittest.main(verbosity=2)
