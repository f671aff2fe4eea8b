#pragma once

#include <memory>

#include <lockstep/train/task.h>

#include "case.h"

namespace lockstep::fuzz {

/// The task of a case: model, data made on the spot, loss, optimizer. Micro-batches count for different amounts.
std::unique_ptr<train::Task> make_task(const Case& c);

}  // namespace lockstep::fuzz
