"""smollm2_test.py BIN_DIR: a real model (SmolLM2-135M-Instruct: Llama, 30 layers, tied, 3 key-value heads of 9) as transformers saves it is imported,
evaluated, trained one step on two ranks with ZeRO-3, and exported. Logits on 5 prompts within 1e-4 of the largest, weights bit by bit."""

import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "support"))
import runs

ROOT = pathlib.Path(__file__).parents[2]
DATA = ROOT / "build" / "data" / "smollm2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def skip(reason):
    print(f"SKIPPED: SmolLM2: {reason}")
    sys.exit(77)


try:
    import accelerate  # noqa: F401: transformers asks for both when it reads GGUF
    import gguf  # noqa: F401
    import numpy
    import torch
    import transformers

    import hugging_face as hf
    import reference
except ImportError as error:
    skip(f"{error}; cmake/setup.sh test installs it")

BOUND, VOCABULARY, LENGTH, PARIS = 1e-4, 49152, 64, 7042
# Ids of the model's own tokenizer. The first: "The capital of France is", which it continues with " Paris.".
PROMPTS = [
    [504, 3575, 282, 4649, 314],
    [6403, 1980, 253, 655, 28, 665, 436, 253, 1165, 8085, 617],
    [1604, 3987, 46477, 24, 94, 727, 472, 585, 304, 2067, 216, 34, 42],
    [1, 4093, 198, 1780, 314, 260, 3995, 3925, 47, 2, 198, 1, 520, 9531, 198],
    [12615, 36411, 418, 216, 33, 32, 32, 5027, 20590, 975],
]


def fetch():
    try:
        done = subprocess.run([ROOT / "tests" / "python" / "fetch_smollm2.sh"], capture_output=True, text=True, timeout=100)
    except subprocess.TimeoutExpired:
        skip("cannot be downloaded in 100 s")
    if done.returncode == 65:
        raise AssertionError(done.stderr)
    if done.returncode != 0:
        skip(f"cannot be downloaded: {(done.stderr.strip().splitlines() or ['?'])[-1]}")


def hugging_face_folder():
    """The weights dequantized, f32, as transformers saves them. Made once."""
    folder = DATA / f"hugging_face-{transformers.__version__}"
    if not (folder / "config.json").exists():
        aside = pathlib.Path(f"{folder}.{os.getpid()}.part")
        read = transformers.AutoModelForCausalLM.from_pretrained(DATA, gguf_file=GGUF, dtype=torch.float32)
        del read.config.quantization_config  # the weights are f32 now
        model = transformers.LlamaForCausalLM(read.config)
        model.load_state_dict(read.state_dict())
        model.save_pretrained(aside)
        shutil.rmtree(folder, ignore_errors=True)
        aside.rename(folder)
    return folder


def check_logits(bin_dir, checkpoint, flags, model):
    theirs = hf.their_logits(model, PROMPTS)
    started = time.monotonic()
    ours = hf.our_logits(bin_dir, checkpoint, flags, PROMPTS, VOCABULARY)
    worst = hf.difference(ours, theirs)
    assert worst <= BOUND, f"logits differ by {worst:.1e} of the largest"
    print(f"logits of 5 prompts within {worst:.1e} of the largest (bound {BOUND}), {time.monotonic() - started:.1f} s", flush=True)
    return ours


def check_training(bin_dir, folder, flags, imported, model):
    """The loss before the step is transformers' own on the same batch; after the step it is lower."""
    data, run_dir, seed = folder / "train.bin", folder / "run", 3
    write_text(data)
    said = runs.run(bin_dir, "gpt", 2, run_dir, [*flags, f"--sequence_length={LENGTH}", f"--init_from={imported}", "--zero_stage=3", "--steps=1", "--global_batch_size=2", "--micro_batch_size=1",
                                          f"--train_data={data}", f"--validation_data={data}", "--eval_interval_steps=1", "--learning_rate=1e-4", f"--seed={seed}",
                                          "--checkpoint_interval_steps=0"])
    loss = runs.losses(run_dir)[0][1]
    batches = reference.Batches(data, LENGTH, 2, seed)
    tokens, targets = batches.step(0)
    with torch.no_grad():
        expected = torch.nn.functional.cross_entropy(model(tokens).logits.flatten(0, 1), targets.flatten()).item()
    assert abs(loss - expected) <= BOUND * expected, f"loss {loss}, transformers says {expected}"
    after = float(re.findall(r"validation loss ([0-9.]+)", said)[-1])
    print(f"one step on 2 ranks with ZeRO-3: loss {loss:.5f}, transformers {expected:.5f}; validation loss after it {after:.5f}", flush=True)
    assert after < expected, "the step made the loss on its own batch no smaller"


def write_text(path):
    """Two samples, so one batch: the tokens of the prompts, over and over."""
    tokens = [token for _ in range(2 * LENGTH) for prompt in PROMPTS for token in prompt][: 2 * LENGTH + 1]
    header = numpy.zeros(256, dtype="<i4")
    header[:3] = 20240520, 1, len(tokens)
    path.write_bytes(header.tobytes() + numpy.array(tokens, dtype="<u2").tobytes())


def main():
    bin_dir = pathlib.Path(sys.argv[1])
    torch.set_num_threads(2)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    fetch()
    source = hugging_face_folder()
    model = hf.load(source)
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        imported, back = folder / "imported", folder / "back"
        started = time.monotonic()
        hf.lockstep(bin_dir, "import", source, imported)
        print(f"imported in {time.monotonic() - started:.1f} s", flush=True)
        flags = [f"--flagfile={imported / 'model.flags'}"]
        ours = check_logits(bin_dir, imported, flags, model)
        assert ours[0][-1].argmax() == PARIS, f"after the first prompt comes {ours[0][-1].argmax()}"
        started = time.monotonic()
        hf.lockstep(bin_dir, "export", imported, back)
        print(f"exported in {time.monotonic() - started:.1f} s", flush=True)
        hf.assert_same_bits(hf.load(back), model)
        shutil.rmtree(back)
        check_training(bin_dir, folder, flags, imported, model)


if __name__ == "__main__":
    main()
