// Any bytes at the agents' port, from a stranger and as a message, both ways.
#include <string>

#include <sys/socket.h>

#include <lockstep/base/error.h>

#include "../../../launcher/src/agent_messages.h"
#include "../../../launcher/src/secure_channel.h"
#include "fuzz_target.h"

using namespace lockstep::launcher;

namespace {

template <typename Decode>
void try_to(Decode decode, std::string_view body) {
  try {
    const auto message = decode(body);
    const std::string once = encode(message);
    FUZZ_CHECK(encode(decode(once)) == once);
  } catch (const lockstep::CorruptData&) {
  }
}

void meet(SecureChannel::Side side, std::string_view bytes) {
  static const Token token = Token::random();
  int ends[2];
  if (::socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, ends) != 0) return;
  const lockstep::UniqueFd wire(ends[1]);
  SecureChannel channel(lockstep::UniqueFd(ends[0]), token, side, {});
  if (::send(wire.get(), bytes.data(), bytes.size(), MSG_NOSIGNAL) < 0) return;
  for (int i = 0; i < 4; ++i) channel.advance({});
  FUZZ_CHECK(!channel.is_open() && !channel.next());
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  try_to([](std::string_view body) { return decode_from_agent(body); }, text);
  try_to([](std::string_view body) { return decode_from_supervisor(body); }, text);
  meet(SecureChannel::Side::kServer, text);
  meet(SecureChannel::Side::kClient, text);
  return 0;
}
