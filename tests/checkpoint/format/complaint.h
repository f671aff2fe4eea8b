#pragma once

#include <string>

#include <lockstep/base/error.h>

namespace lockstep::format {

/// The message of the CorruptData that `body` throws; empty when it throws none.
template <typename Body>
std::string complaint_of(Body body) {
  try {
    body();
    return "";
  } catch (const CorruptData& error) {
    return error.what();
  }
}

}  // namespace lockstep::format
