#include "boundary.h"

#include <algorithm>

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/zeros.h>

#include <lockstep/base/error.h>

namespace lockstep {
namespace {

constexpr int kHeaderTag = 0, kBodyTag = 1;
constexpr int64_t kHeaderFields = 8 + 2 * BoundaryExchange::kMaxDims;
enum Field { kKind, kMicroBatch, kBoundary, kFlags, kDtype, kDims, kBodyBytes, kSizes = 8, kStrides = 16 };
enum Flag { kIsDefined = 1, kRequiresGrad = 2, kAsItLies = 4 };

// Elements from the first one in memory to the last.
int64_t span_elements(at::IntArrayRef sizes, at::IntArrayRef strides) {
  int64_t span = 1;
  for (size_t dim = 0; dim < sizes.size(); ++dim) {
    if (sizes[dim] == 0) return 0;
    span += (sizes[dim] - 1) * strides[dim];
  }
  return span;
}

at::Tensor bytes_of(const at::Tensor& tensor) {  // its memory from the first element to the last
  return tensor.as_strided({span_elements(tensor.sizes(), tensor.strides())}, {1}).view(at::kByte);
}

std::string name_of(const BoundaryKey& key) {
  return std::string(key.is_gradient ? "gradient" : "activation") + " of micro-batch " +
         std::to_string(key.micro_batch) + " at the boundary after position " + std::to_string(key.boundary);
}

}  // namespace

void BoundaryExchange::send(int to, const BoundaryKey& key, const BoundaryTensor& tensor) {
  at::Tensor header = at::zeros({kHeaderFields}, at::kLong), body;
  int64_t* field = header.mutable_data_ptr<int64_t>();
  field[kKind] = key.is_gradient;
  field[kMicroBatch] = key.micro_batch;
  field[kBoundary] = key.boundary;
  if (const at::Tensor& value = tensor.value; value.defined()) {
    LOCKSTEP_CHECK(value.layout() == at::kStrided && value.dim() <= kMaxDims)
        << name_of(key) << " is " << value.toString() << " of " << value.dim() << " dims; dense of at most " << kMaxDims
        << " travel";
    const bool as_it_lies = span_elements(value.sizes(), value.strides()) <= value.numel();
    body = bytes_of(as_it_lies ? value : value.contiguous());
    field[kFlags] = kIsDefined | (tensor.requires_grad ? kRequiresGrad : 0) | (as_it_lies ? kAsItLies : 0);
    field[kDtype] = static_cast<int64_t>(value.scalar_type());
    field[kDims] = value.dim();
    field[kBodyBytes] = body.numel();
    std::copy(value.sizes().begin(), value.sizes().end(), field + kSizes);
    std::copy(value.strides().begin(), value.strides().end(), field + kStrides);
  }
  Outgoing& outgoing = outgoing_.emplace_back();
  outgoing.header = group_.send(header, to, kHeaderTag, timeout_);
  if (body.defined() && body.numel() > 0) outgoing.body = group_.send(body, to, kBodyTag, timeout_);
}

void BoundaryExchange::expect(int from, const BoundaryKey& key) {
  incoming_[from].emplace_back().key = key;
  poll();
}

bool BoundaryExchange::post_body(int from, Incoming& incoming, bool block) {
  if (incoming.is_body_posted) return true;
  if (!incoming.header.defined()) {
    incoming.header = at::empty({kHeaderFields}, at::kLong);
    incoming.header_work = group_.recv(incoming.header, from, kHeaderTag, timeout_);
  }
  if (block) incoming.header_work.wait();
  if (!incoming.header_work.poll()) return false;
  read_header(from, incoming);
  incoming.is_body_posted = true;
  return true;
}

void BoundaryExchange::read_header(int from, Incoming& incoming) {
  const int64_t* field = incoming.header.const_data_ptr<int64_t>();
  const BoundaryKey sent{field[kKind] != 0, field[kMicroBatch], static_cast<int>(field[kBoundary])};
  LOCKSTEP_CHECK(sent == incoming.key) << "stage " << group_.rank() << " expects the " << name_of(incoming.key)
                                       << " from stage " << from << ", which sent the " << name_of(sent)
                                       << ": the stages run different schedules";
  if (!(field[kFlags] & kIsDefined)) return;
  const at::IntArrayRef sizes(field + kSizes, field[kDims]), strides(field + kStrides, field[kDims]);
  const auto options = at::TensorOptions().dtype(static_cast<at::ScalarType>(field[kDtype])).device(device_);
  incoming.tensor = {at::empty_strided(sizes, strides, options), (field[kFlags] & kRequiresGrad) != 0};
  if (field[kBodyBytes] == 0) return;
  if (!(field[kFlags] & kAsItLies)) incoming.row_major = at::empty(sizes, options);
  const at::Tensor body = bytes_of(incoming.row_major.defined() ? incoming.row_major : incoming.tensor.value);
  LOCKSTEP_CHECK(body.numel() == field[kBodyBytes])
      << name_of(sent) << " has " << field[kBodyBytes] << " bytes, its shape " << body.numel();
  incoming.body_work = group_.recv(body, from, kBodyTag, timeout_);
}

BoundaryTensor BoundaryExchange::take(int from, const BoundaryKey& key) {
  auto& queue = incoming_[from];
  const auto wanted = std::find_if(queue.begin(), queue.end(), [&](const Incoming& item) { return item.key == key; });
  LOCKSTEP_CHECK(wanted != queue.end()) << "stage " << group_.rank() << " needs the " << name_of(key)
                                        << ", for which its schedule has no receive";
  for (auto item = queue.begin(); item <= wanted; ++item) {  // messages come in the order of their sends
    post_body(from, *item, /*block=*/true);
    item->body_work.wait();
  }
  BoundaryTensor tensor = std::move(wanted->tensor);
  if (wanted->row_major.defined()) tensor.value.copy_(wanted->row_major);
  queue.erase(wanted);
  return tensor;
}

void BoundaryExchange::poll() {
  std::erase_if(outgoing_, [](Outgoing& outgoing) { return outgoing.header.poll() && outgoing.body.poll(); });
  for (auto& [from, queue] : incoming_) {
    for (Incoming& incoming : queue) {
      if (!post_body(from, incoming, /*block=*/false)) break;
    }
    for (Incoming& incoming : queue) {  // bodies in their order too
      if (!incoming.is_body_posted || !incoming.body_work.poll()) break;
    }
  }
}

void BoundaryExchange::finish() {
  for (Outgoing& outgoing : outgoing_) {
    outgoing.header.wait();
    outgoing.body.wait();
  }
  outgoing_.clear();
}

bool BoundaryExchange::is_idle() const {
  return outgoing_.empty() &&
         std::all_of(incoming_.begin(), incoming_.end(), [](const auto& peer) { return peer.second.empty(); });
}

}  // namespace lockstep
