"""What the tests of import and export share: the verbs, logits of both sides, and comparisons of weights bit by bit."""

import pathlib
import subprocess

import numpy
import torch
import transformers


def lockstep(bin_dir, *words, expect=0, prefix=()):
    """Runs a verb and returns what it said; another exit code fails the test."""
    done = subprocess.run([*prefix, str(bin_dir / "lockstep"), *map(str, words)], capture_output=True, text=True, timeout=120)
    said = done.stdout + done.stderr
    assert done.returncode == expect, f"lockstep {' '.join(map(str, words))} ended with {done.returncode}, not {expect}:\n{said[-3000:]}"
    return said


def our_logits(bin_dir, checkpoint, flags, prompts, vocab_size):
    """Logits of a checkpoint (or run) by our program: a list of arrays [tokens, vocabulary]."""
    folder = pathlib.Path(checkpoint).parent
    asked, answered = folder / "prompts.txt", folder / "logits.f32"
    asked.write_text("".join(" ".join(map(str, prompt)) + "\n" for prompt in prompts))
    subprocess.run([str(bin_dir / ".." / "tests" / "gpt_logits"), *flags, str(checkpoint), str(asked), str(answered)], check=True, timeout=120)
    logits = numpy.fromfile(answered, dtype=numpy.float32).reshape(-1, vocab_size)
    assert len(logits) == sum(map(len, prompts)), f"{len(logits)} rows of logits"
    return numpy.split(logits, numpy.cumsum([len(prompt) for prompt in prompts])[:-1])


def their_logits(model, prompts):
    with torch.no_grad():
        return [model(torch.tensor([prompt])).logits[0].float().numpy() for prompt in prompts]


def difference(ours, theirs):
    """The largest difference, relative to the largest logit, over all prompts."""
    return max(numpy.abs(a - b).max() / numpy.abs(b).max() for a, b in zip(ours, theirs, strict=True))


def load(folder, dtype=torch.float32):
    """As a user of transformers would; missing or unexpected weights fail the test."""
    model, report = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        names = [name for name in report[kind] if not name.endswith(".attn.masked_bias")]  # a constant of old files
        assert not names, f"{folder}: {kind} {names}"
    return model.eval()


def assert_same_bits(ours, theirs):
    """Two models have the same weights, bit by bit."""
    ours, theirs = ours.state_dict(), theirs.state_dict()
    assert ours.keys() == theirs.keys(), ours.keys() ^ theirs.keys()
    for name, tensor in theirs.items():
        assert tensor.dtype == ours[name].dtype and torch.equal(ours[name].view(torch.uint8), tensor.view(torch.uint8)), f"{name} has other bits"
