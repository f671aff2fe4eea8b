#include "agree.h"

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>

#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>

#include <lockstep/base/error.h>
#include <lockstep/base/log.h>
#include <lockstep/format/reader.h>

namespace lockstep::checkpoint {
namespace {

Outcome outcome_of(const IoError& error) {
  if (format::is_damage(error)) return Outcome::kCorrupt;
  // A full table may have room soon.
  constexpr std::array<int, 7> kPassing = {EMFILE, ENFILE, ENOMEM, EAGAIN, EINTR, ESTALE, ETIMEDOUT};
  const bool passes = std::find(kPassing.begin(), kPassing.end(), error.error_number()) != kPassing.end();
  return passes ? Outcome::kBusy : Outcome::kFailed;
}

int64_t reduce(ProcessGroup& world, int64_t mine, ReduceOp op, Milliseconds timeout) {
  const at::Tensor number = at::full({1}, mine, at::kLong);
  world.all_reduce(number, op, timeout).wait();
  return *number.const_data_ptr<int64_t>();
}

void broadcast_text(ProcessGroup& world, int root, std::string& text, Milliseconds timeout) {
  const at::Tensor length = at::full({1}, static_cast<int64_t>(text.size()), at::kLong);
  world.broadcast(length, root, timeout).wait();
  at::Tensor bytes = at::empty({*length.const_data_ptr<int64_t>()}, at::kByte);
  text.resize(static_cast<size_t>(bytes.numel()));
  if (text.empty()) return;
  std::memcpy(bytes.mutable_data_ptr<uint8_t>(), text.data(), text.size());
  world.broadcast(bytes, root, timeout).wait();
  std::memcpy(text.data(), bytes.const_data_ptr<uint8_t>(), text.size());
}

[[noreturn]] void throw_as(ExitCode code, const std::string& message) {
  switch (code) {
    case ExitCode::kFenced:
      throw Fenced(message);
    case ExitCode::kConfig:
      throw ConfigError(message);
    case ExitCode::kBadData:
      throw CorruptData(message);
    default:
      throw Error(code, message);
  }
}

Verdict try_quietly(const std::function<void()>& work) {
  try {
    work();
    return {};
  } catch (const IoError& error) {
    return {outcome_of(error), error.what()};
  } catch (const CorruptData& error) {
    return {Outcome::kCorrupt, error.what()};
  } catch (const Fenced& error) {
    return {Outcome::kFenced, error.what()};
  }
}

}  // namespace

Verdict try_here(const std::string& doing, const std::function<void()>& work) {
  Verdict verdict = try_quietly(work);
  if (verdict.outcome != Outcome::kDone) LOG(ERROR) << doing << " failed: " << verdict.reason;
  return verdict;
}

Verdict attempt(ProcessGroup& world, const std::string& doing, Milliseconds timeout,
                const std::function<void()>& work) {
  Verdict verdict = try_quietly(work);
  const auto worst =
      static_cast<Outcome>(reduce(world, static_cast<int64_t>(verdict.outcome), ReduceOp::kMax, timeout));
  if (worst == Outcome::kDone) return verdict;
  // A damaged file fails on every rank that reads it: the lowest one speaks for all.
  const int64_t claim = verdict.outcome == worst ? world.rank() : world.size();
  const auto witness = static_cast<int>(reduce(world, claim, ReduceOp::kMin, timeout));
  if (world.rank() != witness && verdict.outcome != Outcome::kDone) VLOG(1) << doing << " failed: " << verdict.reason;
  broadcast_text(world, witness, verdict.reason, timeout);
  verdict.outcome = worst;
  if (world.rank() == witness || world.rank() == 0)
    LOG(ERROR) << doing << " failed on rank " << witness << ": " << verdict.reason;
  return verdict;
}

std::string on_chief(ProcessGroup& world, Milliseconds timeout, const std::function<std::string()>& work) {
  std::string text;
  ExitCode code = ExitCode::kDone;
  if (world.rank() == 0) {
    try {
      text = work();
    } catch (const Error& error) {
      code = error.exit_code();
      text = error.what();
    }
  }
  code = static_cast<ExitCode>(reduce(world, static_cast<int64_t>(code), ReduceOp::kMax, timeout));
  broadcast_text(world, 0, text, timeout);
  if (code != ExitCode::kDone) throw_as(code, text);
  return text;
}

}  // namespace lockstep::checkpoint
