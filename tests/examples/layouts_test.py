"""layouts_test.py BIN_DIR [--all]: one GPT, one Llama-style model, one with experts, the same global batch, 20 steps: losses, gradient norms, weights and optimizer
state have the same bits on every layout of tier A, listed below: data parallelism x ZeRO x pipeline x schedule x recomputation x buckets x back end.

The back ends here are shared memory and MPI; same_bits_local_test.cc says the same of `local`. Without --all each model
takes every seventh layout (seven, so that all that takes turns still does); the fuzzer draws many more (tests/fuzz)."""

import itertools
import os
import pathlib
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "support"))
import runs

STEPS = 20
COMMON = [f"--steps={STEPS}", "--checkpoint_interval_steps=0", "--eval_interval_steps=0", "--learning_rate=2e-3", "--warmup_steps=5", "--log_interval_steps=1000",
          "--layers=4", "--width=48", "--heads=4", "--sequence_length=24", "--global_batch_size=16", "--micro_batch_size=2"]
MODELS = {
    "gpt2, tied head, dropout, clipped": ["--model=gpt2", "--dropout=0.1", "--clip_norm=0.5"],
    "llama, grouped keys, not clipped": ["--model=llama", "--kv_heads=2", "--tied_head=false", "--clip_norm=0"],
    "llama, experts": ["--model=llama", "--experts=4", "--ffn_width=32"],
}


def pipeline(stages, schedule):
    by_hand = ["--pipeline_split=1,1,0,1,1,0,1,1"] if schedule == "interleaved" and stages == 4 else []  # eight pieces of six layers
    return [f"--pipeline_parallel_size={stages}", f"--pipeline_schedule={schedule}", *by_hand]


def layouts():
    """(ranks, flags): data-parallel sizes that divide the eight micro-batches and that do not; everything else takes turns."""
    schedules = {2: itertools.cycle(["1f1b", "gpipe", "interleaved"]), 4: itertools.cycle(["gpipe", "interleaved", "1f1b"])}
    recompute = itertools.cycle(["none", "full", "selective"])
    backends = itertools.cycle(["shm", "mpi"])
    buckets = itertools.cycle([1 << 10, 1 << 20, 1 << 40])
    for stages, sizes in ((1, (1, 2, 3, 4, 5, 8)), (2, (1, 2, 3, 4, 5)), (4, (1, 2))):
        for size, zero in itertools.product(sizes, (0, 1, 2, 3)):
            flags = [f"--zero_stage={zero}", f"--recompute={next(recompute)}", f"--bucket_bytes={next(buckets)}"]
            if stages * size > 1:
                flags.append(f"--backend={next(backends)}")
            if stages > 1:
                flags += pipeline(stages, next(schedules[stages]))
            yield stages * size, flags
    for zero in (1, 2, 3):  # sharded over neighbours, replicated beyond; splits by hand; spare cores
        yield 4, [f"--zero_stage={zero}", "--zero_shard_size=2"]
        yield 6, [f"--zero_stage={zero}", "--zero_shard_size=3"]
        yield 4, [f"--zero_stage={zero}", "--pipeline_parallel_size=2", "--pipeline_split=0,6"]
    yield 3, ["--pipeline_parallel_size=3", "--pipeline_split=1,2,3"]
    yield 1, ["--parallel_micro_batches=3"]
    yield 2, ["--parallel_micro_batches=2", "--zero_stage=1"]
    # Many ranks. None of these five is a seventh.
    yield 16, [*pipeline(2, "1f1b"), "--zero_stage=3", "--backend=mpi"]
    yield 16, [*pipeline(2, "interleaved"), "--zero_stage=1", "--backend=shm", "--recompute=full"]
    yield 12, [*pipeline(4, "gpipe"), "--zero_stage=3", "--backend=shm", "--recompute=selective"]
    yield 16, [*pipeline(4, "interleaved"), "--zero_stage=2", "--backend=mpi"]
    yield 20, [*pipeline(4, "1f1b"), "--zero_stage=1", "--backend=shm", "--bucket_bytes=1024"]


def expert_layouts():
    """Experts shared by ranks of the data axis."""
    yield 2, ["--expert_parallel_size=2", "--backend=shm"]
    yield 4, ["--expert_parallel_size=4", "--backend=mpi", "--recompute=full"]
    yield 4, ["--expert_parallel_size=2", "--zero_stage=1"]
    yield 4, ["--expert_parallel_size=2", "--pipeline_parallel_size=2", "--pipeline_schedule=interleaved", "--zero_stage=1"]
    yield 8, ["--expert_parallel_size=2", "--zero_stage=1", "--zero_shard_size=4", "--bucket_bytes=1024"]


def main():
    bin_dir, every = pathlib.Path(sys.argv[1]), "--all" in sys.argv or os.environ.get("LOCKSTEP_DEEP")
    with tempfile.TemporaryDirectory() as folder:
        data = pathlib.Path(folder, "gpt.bin")
        runs.write_tokens(data, 20_000)
        for model_number, (model, flags) in enumerate(MODELS.items()):
            first, count = None, 0
            for number, (ranks, layout) in enumerate([(1, []), *layouts(), *(expert_layouts() if "--experts=4" in flags else [])]):
                if not every and number % 7 and not any("expert" in flag for flag in layout):
                    continue
                run_dir = pathlib.Path(folder, f"{model_number}-{number}")
                runs.run(bin_dir, "gpt", ranks, run_dir, [f"--train_data={data}", *COMMON, *flags, *layout])
                result = ([(line["step"], line["loss"], line["grad_norm"]) for line in runs.metrics(run_dir)], runs.digests(bin_dir, run_dir))
                first = first or result
                where = f"{model}: {ranks} ranks {' '.join(layout)}"
                assert len(result[0]) == STEPS, where
                different = [a for a, b in zip(first[0], result[0]) if a != b]
                assert not different, f"{where}: differs from one rank at step {different[0][0]}: {different[0]}"
                assert result[1] == first[1], f"{where}: digests differ: {result[1]} and {first[1]}"
                count += 1
                print(f"{where}: same bits", flush=True)
            assert first[0][-1][1] < 0.9 * first[0][0][1], f"{model} learnt nothing, so nothing was tested"
            print(f"{model}: {count} layouts, weights {first[1][1]}, optimizer {first[1][2]}", flush=True)


if __name__ == "__main__":
    main()
