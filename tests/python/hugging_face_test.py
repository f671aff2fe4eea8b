"""hugging_face_test.py BIN_DIR: folders of GPT-2 and Llama models that transformers made, in old and new spellings, in one file and in several, in
f32, f16 and bf16, imported, evaluated, trained and exported. transformers is the oracle: logits within 1e-4 of the largest, weights bit by bit."""

import json
import os
import pathlib
import shutil
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "support"))
import runs

try:
    import safetensors.torch
    import torch
    import transformers

    import hugging_face as hf
    import reference
except ImportError as error:
    print(f"SKIPPED: Hugging Face import and export: {error}; cmake/setup.sh test installs it")
    sys.exit(77)

CONFIG, DATA = 78, 65
BOUND = 1e-4
VOCABULARY, LENGTH = 320, 24
MIB = 1 << 20


def gpt2(**changes):
    return transformers.GPT2Config(**{"vocab_size": VOCABULARY, "n_positions": LENGTH, "n_embd": 48, "n_layer": 3, "n_head": 4, "bos_token_id": 0, "eos_token_id": 0, **changes})


def llama(**changes):
    sizes = {"vocab_size": VOCABULARY, "max_position_embeddings": LENGTH, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 6}
    return transformers.LlamaConfig(**{**sizes, "num_key_value_heads": 2, **changes})


def new_model(config, seed, dtype=torch.float32):
    """Random in every tensor: biases of zero and norms of one would hide a mistake."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        is_norm = parameter.dim() == 1 and name.endswith("weight")
        torch.nn.init.normal_(parameter, mean=1.0 if is_norm else 0.0, std=0.15)
    return model.to(dtype)


def edit_config(folder, change):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def old_llama_spelling(config):
    rope = config.pop("rope_parameters")
    config["rope_theta"], config["rope_scaling"] = rope["rope_theta"], None
    config["torch_dtype"] = config.pop("dtype")
    config.pop("head_dim", None)


def old_gpt2_spelling(config):
    config["torch_dtype"] = config.pop("dtype", "float16")
    config["n_ctx"] = config["n_positions"]
    config.pop("tie_word_embeddings", None)
    config.pop("add_cross_attention", None)


def add_old_buffers(folder):
    """The masks that GPT-2 files of old versions hold."""
    for path in folder.glob("*.safetensors"):
        tensors = safetensors.torch.load_file(path)
        for layer in {name.split(".")[1] for name in tensors if ".attn.c_attn.weight" in name}:
            tensors[f"h.{layer}.attn.bias"] = torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.uint8).tril()
            tensors[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
        safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    index = folder / "model.safetensors.index.json"
    if index.exists():
        table = json.loads(index.read_text())
        for path in folder.glob("*.safetensors"):
            table["weight_map"].update({name: path.name for name in safetensors.torch.load_file(path)})
        index.write_text(json.dumps(table))


def save_old_gpt2(model, folder):
    """Without the prefix and the head, as the folders of before transformers 4 are."""
    model.transformer.save_pretrained(folder, max_shard_size="60KB")
    edit_config(folder, old_gpt2_spelling)
    add_old_buffers(folder)


def save_old_llama(model, folder):
    model.save_pretrained(folder, max_shard_size="60KB")
    edit_config(folder, old_llama_spelling)


def save_with_tied_head(model, folder):
    """A tied head that is stored all the same."""
    model.save_pretrained(folder)
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"].clone()
    safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def save(model, folder):
    model.save_pretrained(folder)


# (name, config, dtype of the files, how they are written, files)
CASES = [
    ("llama", llama(rope_parameters={"rope_theta": 50000.0, "rope_type": "default"}, rms_norm_eps=1e-3), "float32", save, 1),
    ("llama-old-tied-sharded-bf16", llama(tie_word_embeddings=True, rope_theta=25000.0), "bfloat16", save_old_llama, 3),
    ("llama-all-heads-f16", llama(num_key_value_heads=6), "float16", save, 1),
    ("gpt2", gpt2(layer_norm_epsilon=2e-3), "float32", save, 1),
    ("gpt2-old-sharded-f16", gpt2(n_inner=100), "float16", save_old_gpt2, 3),
    ("gpt2-untied-bf16", gpt2(tie_word_embeddings=False), "bfloat16", save, 1),
    ("gpt2-tied-head-stored", gpt2(), "float32", save_with_tied_head, 1),
]
SHORT = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}


def prompts():
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(VOCABULARY, (length,), generator=generator).tolist() for length in (1, 2, 7, 16, LENGTH)]


def check(bin_dir, folder, case, seed):
    """There and back: logits after the import, bits after the export, in f32 and in the dtype it came in."""
    name, config, dtype, save_model, files = case
    source, imported, back = folder / "source", folder / "imported", folder / "back"
    save_model(new_model(config, seed, getattr(torch, dtype)), source)
    assert len(list(source.glob("*.safetensors"))) >= files, list(source.iterdir())
    hf.lockstep(bin_dir, "import", f"{source}/", imported)
    hf.lockstep(bin_dir, "verify", imported)
    reference_model = hf.load(source)
    ours = hf.our_logits(bin_dir, imported, [f"--flagfile={imported / 'model.flags'}"], prompts(), VOCABULARY)
    worst = hf.difference(ours, hf.their_logits(reference_model, prompts()))
    assert worst <= BOUND, f"logits differ by {worst:.1e} of the largest"
    hf.lockstep(bin_dir, "export", imported, back / "f32", "--max_shard_bytes", 60_000 if files > 1 else 10**9)
    assert len(list((back / "f32").glob("*.safetensors"))) > (files > 1)
    hf.assert_same_bits(hf.load(back / "f32"), reference_model)
    hf.lockstep(bin_dir, "export", "--format=hf", f"--dtype={SHORT[dtype]}", imported, back / "own")
    hf.assert_same_bits(hf.load(back / "own", "auto"), hf.load(source, getattr(torch, dtype)))
    print(f"{name}: logits within {worst:.1e} (bound {BOUND}), weights bit-equal", flush=True)
    return imported


def check_training(bin_dir, folder, imported):
    """One step from imported weights on two ranks with ZeRO-3: the loss before it is transformers' loss on the same batch; the run exports again."""
    data, run_dir, source, flags = folder / "train.bin", folder / "run", folder / "source", f"--flagfile={imported / 'model.flags'}"
    runs.write_tokens(data, 4000)
    runs.run(bin_dir, "gpt", 2, run_dir, [flags, f"--init_from={imported}", "--zero_stage=3", "--steps=1", "--global_batch_size=4", "--micro_batch_size=1", f"--train_data={data}",
                                          f"--validation_data={data}", "--eval_interval_steps=1", "--learning_rate=1e-2", "--seed=3"])
    loss = runs.losses(run_dir)[0][1]
    tokens, targets = reference.Batches(data, LENGTH, 4, 3).step(0)
    with torch.no_grad():
        logits = hf.load(source)(tokens).logits
        expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).item()
    assert abs(loss - expected) <= 1e-5 * expected, f"loss {loss}, transformers says {expected}"
    hf.lockstep(bin_dir, "export", run_dir, folder / "trained")
    trained = hf.load(folder / "trained")
    worst = hf.difference(hf.our_logits(bin_dir, run_dir, [flags], prompts(), VOCABULARY), hf.their_logits(trained, prompts()))
    assert worst <= BOUND, f"logits after training differ by {worst:.1e}"
    moved = hf.difference(hf.their_logits(trained, prompts()), hf.their_logits(hf.load(source), prompts()))
    assert moved > 100 * BOUND, "the step moved nothing, so nothing was tested"
    print(f"  a step from there: loss {loss:.6f}, transformers {expected:.6f}; exported again within {worst:.1e}", flush=True)


def check_every_bit_pattern(bin_dir, folder):
    """Every f16 and bf16 there is comes in as torch widens it and goes out as it came; random f32 bits are rounded as torch rounds them."""
    config = llama(vocab_size=2 * VOCABULARY, hidden_size=256, num_attention_heads=2, num_key_value_heads=2, num_hidden_layers=1)
    every = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(256, 256)
    for dtype in (torch.bfloat16, torch.float16):
        values, name = every.view(dtype), "model.layers.0.self_attn.q_proj.weight"
        source, imported, back = (folder / f"{dtype}-{part}" for part in ("source", "imported", "back"))
        model = new_model(config, 1, dtype)
        model.save_pretrained(source)
        tensors = safetensors.torch.load_file(source / "model.safetensors")
        tensors[name] = values
        safetensors.torch.save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
        hf.lockstep(bin_dir, "import", source, imported)
        widened = reference.read_weights(imported)["block0.query.weight"]
        finite = ~values.isnan()
        assert torch.equal(widened[finite].view(torch.int32), values.float()[finite].view(torch.int32)) and widened.isnan().eq(~finite).all()
        short = SHORT[str(dtype).removeprefix("torch.")]
        hf.lockstep(bin_dir, "export", imported, back, "--dtype", short)
        assert torch.equal(safetensors.torch.load_file(back / "model.safetensors")[name].view(torch.uint16), every)
        # The same way with f32 bits that do not fit.
        torch.manual_seed(2)
        random = torch.randint(-(2**31), 2**31, (256, 256), dtype=torch.int64).to(torch.int32).view(torch.float32)
        ties = (values.float().double() + (values.float().double() - every.roll(1).view(dtype).float().double()) / 2).float().flatten()[:65536].view(256, 256)
        for number, f32 in enumerate((random, ties)):
            f32 = torch.where(f32.isfinite() & (f32.abs() < torch.finfo(dtype).max), f32, 1.5)
            tensors = {key: value.float() for key, value in tensors.items()} | {name: f32}
            safetensors.torch.save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
            hf.lockstep(bin_dir, "import", source, f"{imported}{number}")
            hf.lockstep(bin_dir, "export", f"{imported}{number}", f"{back}{number}", "--dtype", short)
            rounded = safetensors.torch.load_file(pathlib.Path(f"{back}{number}", "model.safetensors"))[name]
            assert torch.equal(rounded.view(torch.uint16), f32.to(dtype).view(torch.uint16)), f"{dtype}: rounded otherwise than torch does"
    print("every f16 and bf16 goes in and out with its bits; f32 is rounded as torch rounds it", flush=True)


def check_memory(bin_dir, folder):
    """Weights of 400 MB go in and out of a process that may hold its largest tensor and 48 MiB more."""
    width, layers = 2048, 2
    config = gpt2(n_embd=width, n_layer=layers, vocab_size=256)
    largest = 4 * 4 * width * width
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder / "source")
    total = sum(4 * parameter.numel() for parameter in model.parameters())
    assert total > 5 * largest
    limit = ["prlimit", f"--data={largest + 48 * MIB}"]
    hf.lockstep(bin_dir, "import", folder / "source", folder / "imported", prefix=limit)
    hf.lockstep(bin_dir, "export", folder / "imported", folder / "back", prefix=limit)
    hf.assert_same_bits(hf.load(folder / "back"), model)
    print(f"{total / 1e6:.0f} MB of weights pass through {(largest + 48 * MIB) / 1e6:.0f} MB, the largest tensor has {largest / 1e6:.0f}", flush=True)


def damaged(folder, source, change):
    """A copy of a good folder with one thing changed."""
    copy = folder / "bad"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(source, copy)
    change(copy)
    return copy


def drop_tensor(folder, name):
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    del tensors[name]
    safetensors.torch.save_file(tensors, folder / "model.safetensors")


def add_tensor(folder, name, tensor):
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    safetensors.torch.save_file({**tensors, name: tensor}, folder / "model.safetensors")


def move_weights_behind_link(folder):
    (folder / "model.safetensors").rename(folder / "blob")
    (folder / "model.safetensors").symlink_to("blob")


def index_outside(folder, name):
    shutil.move(folder / "model.safetensors", folder.parent / "outside.safetensors")
    names = safetensors.torch.load_file(folder.parent / "outside.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, name)}))


def check_bad_input(bin_dir, folder):
    """The documented exit code, words that name the fault, and nothing left behind."""
    source, out = folder / "source", folder / "out"
    new_model(llama(), 1).save_pretrained(source)
    config = lambda **changes: lambda at: edit_config(at, lambda c: c.update(changes))
    cut = lambda at: os.truncate(at / "model.safetensors", os.path.getsize(at / "model.safetensors") - 5)
    bad = [
        ("another architecture", config(model_type="bert"), CONFIG, ["bert", "llama"]),
        ("scaled RoPE", config(rope_parameters={"rope_theta": 1e4, "rope_type": "llama3", "factor": 8.0}), CONFIG, ["rope_parameters", "llama3"]),
        ("scaled RoPE of old", config(rope_scaling={"type": "linear", "factor": 2.0}), CONFIG, ["rope_scaling", "linear"]),
        ("biases", config(attention_bias=True), CONFIG, ["attention_bias"]),
        ("another activation", config(hidden_act="gelu"), CONFIG, ["hidden_act", "gelu"]),
        ("quantized", config(quantization_config={"bits": 4}), CONFIG, ["quantization_config"]),
        ("other sizes than the weights", config(intermediate_size=81), DATA, ["gate_proj", "[80, 48]", "[81, 48]"]),
        ("a layer too few in the weights", config(num_hidden_layers=4), DATA, ["layers.3"]),
        ("a layer too many in the weights", config(num_hidden_layers=2), CONFIG, ["layers.2", "no place"]),
        ("config of no JSON", lambda at: (at / "config.json").write_text("{"), DATA, ["config.json"]),
        ("no config", lambda at: (at / "config.json").unlink(), CONFIG, ["config.json", "Mend"]),
        ("no weights", lambda at: (at / "model.safetensors").unlink(), CONFIG, ["model.safetensors", "Mend"]),
        ("weights cut short", cut, DATA, ["model.safetensors"]),
        ("a tensor too few", lambda at: drop_tensor(at, "model.norm.weight"), DATA, ["model.norm.weight"]),
        ("a tensor too many", lambda at: add_tensor(at, "model.layers.0.self_attn.q_proj.bias", torch.zeros(48)), CONFIG, ["q_proj.bias"]),
        ("integer weights", lambda at: add_tensor(at, "model.norm.weight", torch.zeros(48, dtype=torch.int32)), CONFIG, ["I32"]),
        ("a head that is not the tied one", config(tie_word_embeddings=True), CONFIG, ["lm_head.weight"]),
        ("weights behind a link", move_weights_behind_link, CONFIG, ["link", "cp -rL"]),
        ("index that leads out", lambda at: index_outside(at, "../outside.safetensors"), DATA, ["outside", "elsewhere"]),
        ("index of a file that is not there", lambda at: index_outside(at, "inside.safetensors"), DATA, ["inside.safetensors", "missing"]),
    ]
    for name, change, code, words in bad:
        said = hf.lockstep(bin_dir, "import", damaged(folder, source, change), out, expect=code)
        missing = [word for word in words if word not in said]
        assert not missing, f"{name}: the message does not hold {missing}:\n{said}"
        assert not out.exists(), f"{name}: {list(out.iterdir())} left behind"
    hf.lockstep(bin_dir, "import", source, out)
    again = hf.lockstep(bin_dir, "import", source, out, expect=CONFIG)
    assert "already" in again and (out / "MANIFEST").exists(), again
    for words, code, said in [(["import", source], CONFIG, "two paths"), (["export", out, folder / "hf", "--dtype=fp8"], CONFIG, "fp8"),
                              (["export", out, folder / "hf", "--format=onnx"], CONFIG, "onnx"), (["export", source, folder / "hf"], CONFIG, "neither a checkpoint"),
                              (["export", out, source], CONFIG, "already")]:
        assert said in hf.lockstep(bin_dir, *words, expect=code), (words, said)
    shard = next(out.glob("*.safetensors"))
    with open(shard, "r+b") as file:
        file.seek(-1000, os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-1000, os.SEEK_END)
        file.write(bytes([byte ^ 1]))
    hf.lockstep(bin_dir, "export", out, folder / "hf", expect=DATA)
    assert not (folder / "hf").exists(), "an export of damaged weights left something behind"
    large = folder / "large"
    damaged(folder, source, lambda at: add_tensor(at, "model.norm.weight", torch.full((48,), 7e4)))
    hf.lockstep(bin_dir, "import", folder / "bad", large)
    assert "model.norm.weight" in hf.lockstep(bin_dir, "export", large, folder / "hf", "--dtype=f16", expect=CONFIG)
    hf.lockstep(bin_dir, "export", large, folder / "hf", "--dtype=bf16")
    print(f"{len(bad)} bad folders refused by name, nothing left behind", flush=True)


def main():
    bin_dir = pathlib.Path(sys.argv[1])
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for seed, case in enumerate(CASES):
        with tempfile.TemporaryDirectory() as folder:
            imported = check(bin_dir, pathlib.Path(folder), case, seed)
            if case[0] in ("llama", "gpt2-old-sharded-f16"):
                check_training(bin_dir, pathlib.Path(folder), imported)
    for more in (check_every_bit_pattern, check_memory, check_bad_input):
        with tempfile.TemporaryDirectory() as folder:
            more(bin_dir, pathlib.Path(folder))


if __name__ == "__main__":
    main()
