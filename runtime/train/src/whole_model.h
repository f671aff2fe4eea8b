#pragma once

#include <memory>
#include <string>

#include <torch/nn/module.h>

#include <lockstep/base/fs.h>
#include <lockstep/train/task.h>

namespace lockstep::train {

/// The whole model on one rank, out of the newest checkpoint of a run: for layouts under which no rank has it.
/// Not collective. @throws as checkpoint::Store::load.
std::shared_ptr<torch::nn::Module> load_whole_model(Fs& fs, Task& task, const std::string& run_dir);

}  // namespace lockstep::train
