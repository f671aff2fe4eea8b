// checkpoint_bench WHAT BYTES DIR: one checkpoint of BYTES over the ranks of mpirun, timed. WHAT: save (ours, durable),
// write (a plain sequential writer of as many bytes a rank, one fsync), load (ours, every byte verified), read (a plain
// pread of this rank's shard into the same tensors), stall (what a save in the background holds training up for), copy
// (a memcpy of this rank's tensors into memory that is there). load and read want a checkpoint in DIR. Rank 0 prints
// the slowest rank's seconds; a byte that comes back wrong ends it with 1.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include <ATen/ops/empty.h>
#include <mpi.h>

#include <lockstep/checkpoint/checkpoint.h>
#include <lockstep/collectives/mpi_group.h>
#include <lockstep/format/reader.h>

namespace {

using namespace lockstep;
using checkpoint::StateTensor;

constexpr int64_t kColumns = 2048, kTensorBytes = int64_t{16} << 20;  // a tensor's part of each rank

float value_at(size_t tensor, int64_t i) { return static_cast<float>((static_cast<int64_t>(tensor) * 31 + i) % 65521); }

std::vector<StateTensor> make_state(int64_t bytes, const ProcessGroup& world, bool filled) {
  const int64_t rows = kTensorBytes / kColumns / 4 * world.size();
  std::vector<StateTensor> state(static_cast<size_t>(std::max<int64_t>(1, bytes / world.size() / kTensorBytes)));
  for (size_t i = 0; i < state.size(); ++i) {
    state[i] = {"weights", ShardLayout::sharded("layer" + std::to_string(i), {rows, kColumns}, "F32", 0, world.size()),
                at::empty({rows / world.size(), kColumns}, at::kFloat)};
    auto* data = state[i].local.mutable_data_ptr<float>();
    for (int64_t k = 0; k < state[i].local.numel(); ++k) data[k] = filled ? value_at(i, k) : 0;
  }
  return state;
}

bool is_right(const std::vector<StateTensor>& state) {
  for (size_t i = 0; i < state.size(); ++i) {
    const auto* data = state[i].local.const_data_ptr<float>();
    for (int64_t k = 0; k < state[i].local.numel(); ++k) {
      if (data[k] != value_at(i, k)) return false;
    }
  }
  return true;
}

std::span<std::byte> bytes_of(const StateTensor& tensor) {
  return {static_cast<std::byte*>(tensor.local.data_ptr()), tensor.local.nbytes()};
}

void write_plainly(const std::string& path, const std::vector<StateTensor>& state) {
  const auto file = real_fs().create_exclusive(path);
  uint64_t end = 0;
  for (const StateTensor& tensor : state) {
    file->write_at(end, bytes_of(tensor));
    end += tensor.local.nbytes();
  }
  file->sync();
  file->close();
}

void read_plainly(const std::string& path, const std::vector<StateTensor>& state) {
  const auto file = real_fs().open_read(path);
  uint64_t begin = file->size();
  for (const StateTensor& tensor : state)
    begin -= tensor.local.nbytes();  // data lies at the end, in the order of names
  for (const StateTensor& tensor : state) {
    file->read_at(begin, bytes_of(tensor));
    begin += tensor.local.nbytes();
  }
}

void finish(checkpoint::Store& store) {
  while (store.is_saving()) store.advance_save();
}

void copy_plainly(const std::vector<StateTensor>& state, std::vector<std::byte>& memory) {
  size_t end = 0;
  for (const StateTensor& tensor : state) {
    std::memcpy(memory.data() + end, tensor.local.const_data_ptr(), tensor.local.nbytes());
    end += tensor.local.nbytes();
  }
}

int measure(const std::string& what, int64_t bytes, const std::string& dir) {
  const auto world = make_mpi_world();
  const bool writes = what != "load" && what != "read";
  const std::vector<StateTensor> state = make_state(bytes, *world, writes);
  checkpoint::Store store(real_fs(), *world, {.run_dir = dir});
  const std::string shard =
      writes ? "" : format::resolve_checkpoint(real_fs(), dir) + "/" + format::shard_name(world->rank(), world->size());
  const checkpoint::Progress first{.step = 1, .config_json = "{}", .record_json = "{}"};
  checkpoint::Progress second = first;
  second.step = 2;
  std::vector<std::byte> memory(what == "copy" ? state.size() * kTensorBytes : 0);
  if (what == "stall") {
    store.start_save(first, state);
    finish(store);
  }
  world->barrier();
  const auto start = std::chrono::steady_clock::now();
  bool good = true;
  if (what == "save") good = store.save(first, state);
  if (what == "write") write_plainly(dir + "/plain" + std::to_string(world->rank()), state);
  if (what == "stall") good = store.start_save(second, state);
  if (what == "copy") copy_plainly(state, memory);
  if (what == "load") store.load(dir, state);
  if (what == "read") read_plainly(shard, state);
  double took = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count(), slowest = 0;
  if (what == "load") good = is_right(state);
  finish(store);
  MPI_Allreduce(&took, &slowest, 1, MPI_DOUBLE, MPI_MAX, MPI_COMM_WORLD);
  if (world->rank() == 0) std::printf("%.6f\n", slowest);
  world->close();
  return good ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) return 78;
  int granted = 0;
  MPI_Init_thread(&argc, &argv, MPI_THREAD_MULTIPLE, &granted);
  const int code = measure(argv[1], std::atoll(argv[2]), argv[3]);
  MPI_Finalize();
  return code;
}
