#pragma once

#include <cstdint>
#include <deque>
#include <map>
#include <optional>

#include <ATen/core/Tensor.h>

#include <lockstep/collectives/process_group.h>

namespace lockstep {

/// Tensors between the stages of a pipeline, dtype and strides as they were: the same numbers in another layout take
/// other kernels, and those round otherwise.
///
/// On the wire, each tensor is two messages:
///
///     header  24 x i64: 0 kind (0 activation, 1 gradient), 1 micro-batch, 2 boundary (after which position),
///             3 flags (1 there is a tensor, 2 it requires a gradient, 4 its elements lie as they travel),
///             4 dtype (c10::ScalarType), 5 dims (at most 8), 6 bytes of the body, 7 zero, 8-15 sizes, 16-23 strides
///     body    u8, none when the header says 0 bytes. Flag 4: memory from the first element to the last; else the
///             elements in row-major order, because strides leave gaps that are not worth sending
///
/// Example: activation [2, 3, 4, 4] f32, channels-last, of micro-batch 5, after position 0: header 0 5 0 7 6 4 384 0,
/// 2 3 4 4 0 0 0 0, 48 1 12 3 0 0 0 0, then 384 bytes as they lie.
struct BoundaryKey {
  bool is_gradient = false;
  int64_t micro_batch = 0;
  int boundary = 0;
  friend bool operator==(const BoundaryKey&, const BoundaryKey&) = default;
};

struct BoundaryTensor {
  at::Tensor value;  ///< undefined: there is none (a gradient that nothing flows into)
  bool requires_grad = false;
};

/// Sends leave at once and are waited for in finish(); receives are announced by expect(), in the order the peer sends,
/// and waited for in take(). A header is received when the body before it is under way: back ends need not know tags.
/// Threads: one.
class BoundaryExchange {
 public:
  static constexpr int64_t kMaxDims = 8;

  BoundaryExchange(ProcessGroup& group, at::Device device, Milliseconds timeout)
      : group_(group), device_(device), timeout_(timeout) {}

  void send(int to, const BoundaryKey& key, const BoundaryTensor& tensor);
  void expect(int from, const BoundaryKey& key);
  BoundaryTensor take(int from, const BoundaryKey& key);
  /// Lets bytes move, posts bodies whose headers came, lets go of what was sent.
  void poll();
  void finish();
  bool is_idle() const;

 private:
  struct Outgoing {
    Work header, body;
  };
  struct Incoming {
    BoundaryKey key;
    at::Tensor header;
    Work header_work, body_work;
    bool is_body_posted = false;
    BoundaryTensor tensor;
    at::Tensor row_major;  // the body, when it does not travel as it lies
  };
  bool post_body(int from, Incoming& incoming, bool block);  // false: its header is not there yet
  void read_header(int from, Incoming& incoming);

  ProcessGroup& group_;
  at::Device device_;
  Milliseconds timeout_;
  std::deque<Outgoing> outgoing_;
  std::map<int, std::deque<Incoming>> incoming_;  // by peer
};

}  // namespace lockstep
