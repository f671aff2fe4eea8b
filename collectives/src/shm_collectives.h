#pragma once

#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "shm_operation.h"

namespace lockstep {

/// The operations of a shared-memory group, one function each; sizes have been checked.
using ShmWork = std::unique_ptr<ShmOperation>;
ShmWork shm_barrier(std::shared_ptr<ShmChannel> channel, Milliseconds timeout);
ShmWork shm_all_reduce(std::shared_ptr<ShmChannel> channel, const at::Tensor& tensor, ReduceOp op,
                       Milliseconds timeout);
ShmWork shm_reduce_scatter(std::shared_ptr<ShmChannel> channel, const at::Tensor& output, const at::Tensor& input,
                           ReduceOp op, Milliseconds timeout);
ShmWork shm_all_gather(std::shared_ptr<ShmChannel> channel, const at::Tensor& output, const at::Tensor& input,
                       std::span<const int64_t> counts, Milliseconds timeout);
ShmWork shm_all_to_all(std::shared_ptr<ShmChannel> channel, const at::Tensor& output, const at::Tensor& input,
                       std::span<const int64_t> receive_counts, std::span<const int64_t> send_counts,
                       Milliseconds timeout);
/// `is_there`: on the root, whether what is sent is there yet; the call keeps its place among the calls meanwhile.
ShmWork shm_broadcast(std::shared_ptr<ShmChannel> channel, const at::Tensor& tensor, int root, Milliseconds timeout,
                      std::function<bool()> is_there = {});
std::unique_ptr<Shown> shm_show(std::shared_ptr<ShmChannel> channel, const std::vector<at::Tensor>& tensors,
                                Milliseconds timeout);
/// An operation of another group that is to move on while this memory's are waited for.
ShmWork shm_forwarded(std::shared_ptr<ShmChannel> channel, std::string doing, Work work, Milliseconds timeout);

}  // namespace lockstep
