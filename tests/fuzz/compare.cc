#include "compare.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdlib>
#include <fstream>
#include <functional>
#include <sstream>

#include <ATen/ops/empty.h>
#include <nlohmann/json.hpp>
#include <torch/types.h>

#include <lockstep/base/error.h>
#include <lockstep/format/reader.h>

namespace lockstep::fuzz {
namespace {

// The bits of floats in order, so that a difference counts the floats between two of them.
int64_t place_of(int32_t bits) { return bits >= 0 ? bits : int64_t{INT32_MIN} - bits; }

struct Differing {
  int64_t elements = 0, max_ulp = 0;
};

Differing count_differing(const at::Tensor& a, const at::Tensor& b) {
  Differing differing;
  const auto *x = a.const_data_ptr<float>(), *y = b.const_data_ptr<float>();
  for (int64_t i = 0; i < a.numel(); ++i) {
    const auto bits = std::bit_cast<int32_t>(x[i]), other_bits = std::bit_cast<int32_t>(y[i]);
    if (bits == other_bits) continue;
    ++differing.elements;
    differing.max_ulp = std::max(differing.max_ulp, std::abs(place_of(bits) - place_of(other_bits)));
  }
  return differing;
}

bool same(double a, double b) { return a == b || (std::isnan(a) && std::isnan(b)); }

using Same = std::function<bool(double actual, double expected)>;

// The figures of the steps and of the validation.
std::string differing_figure(const Outcome& actual, const Outcome& expected, const Same& same) {
  std::ostringstream text;
  text.precision(17);
  if (actual.steps.size() != expected.steps.size()) {
    text << actual.steps.size() << " steps, not " << expected.steps.size();
    return text.str();
  }
  for (size_t i = 0; i < actual.steps.size(); ++i) {
    const auto& [loss, grad_norm] = actual.steps[i];
    if (!same(loss, expected.steps[i].loss))
      text << "loss of step " << i + 1 << " is " << loss << ", not " << expected.steps[i].loss;
    else if (!same(grad_norm, expected.steps[i].grad_norm))
      text << "norm of step " << i + 1 << " is " << grad_norm << ", not " << expected.steps[i].grad_norm;
    else
      continue;
    return text.str();
  }
  if (!same(actual.validation_loss, expected.validation_loss))
    text << "validation loss is " << actual.validation_loss << ", not " << expected.validation_loss;
  return text.str();
}

std::string differing_names(const Outcome& actual, const Outcome& expected) {
  for (const auto& [key, tensor] : expected.tensors) {
    const auto found = actual.tensors.find(key);
    if (found == actual.tensors.end()) return key + " is missing";
    if (found->second.sizes() != tensor.sizes() || found->second.scalar_type() != tensor.scalar_type())
      return key + " has another shape";
  }
  return actual.tensors.size() == expected.tensors.size() ? "" : "there are tensors too many";
}

// The gradient of GPT's key bias is 0 in exact arithmetic: what is there is rounding.
bool is_noise(const std::string& key) { return key.ends_with(".key.bias"); }

std::string join(const std::string& one, const std::string& two) {
  return one.empty() || two.empty() ? one + two : one + "; " + two;
}

}  // namespace

Outcome read_outcome(const std::string& run_dir) {
  Outcome outcome;
  std::ifstream file(run_dir + "/metrics.jsonl");
  for (std::string line; std::getline(file, line);) {
    const auto json = nlohmann::json::parse(line);
    const auto figure = [&](const char* name) { return json.at(name).is_null() ? NAN : json.at(name).get<double>(); };
    outcome.steps.push_back({figure("loss"), figure("grad_norm")});
  }
  Fs& fs = real_fs();
  const format::Reader reader(fs, format::resolve_checkpoint(fs, run_dir));
  for (const auto& [key, stored] : reader.manifest().tensors) {
    LOCKSTEP_CHECK(stored.dtype == "F32") << key << " is " << stored.dtype;
    at::Tensor tensor = at::empty(stored.shape, at::kFloat);
    reader.read(key, Box::whole(stored.shape), {static_cast<std::byte*>(tensor.mutable_data_ptr()), tensor.nbytes()});
    outcome.tensors[key] = tensor;
  }
  return outcome;
}

std::string difference(const Outcome& actual, const Outcome& expected) {
  if (std::string names = differing_names(actual, expected); !names.empty()) return names;
  std::string first;
  int64_t tensors = 0;
  for (const auto& [key, tensor] : expected.tensors) {
    const Differing differing = count_differing(actual.tensors.at(key), tensor);
    if (differing.elements == 0) continue;
    if (++tensors > 1) continue;
    first = key + ": " + std::to_string(differing.elements) + " of " + std::to_string(tensor.numel()) +
            " elements differ, by up to " + std::to_string(differing.max_ulp) + " ulp";
  }
  if (tensors > 1)
    first += ", and " + std::to_string(tensors - 1) + " of " + std::to_string(expected.tensors.size()) +
             " tensors beside it";
  return join(differing_figure(actual, expected, same), first);
}

std::string beyond(const Outcome& actual, const Outcome& expected, double bound) {
  if (std::string names = differing_names(actual, expected); !names.empty()) return names;
  const auto near = [&](double a, double b) { return same(a, b) || std::abs(a - b) <= bound * std::abs(b); };
  std::string figure = differing_figure(actual, expected, near);
  std::map<std::string, double> largest;  // by section
  for (const auto& [key, tensor] : expected.tensors) {
    double& section = largest[format::section_of(key)];
    if (tensor.numel() > 0) section = std::max(section, tensor.abs().max().item<double>());
  }
  for (const auto& [key, tensor] : expected.tensors) {
    if (tensor.numel() == 0 || is_noise(key)) continue;
    const double scale = std::max(tensor.abs().max().item<double>(), 1e-3 * largest[format::section_of(key)]);
    const double error = (actual.tensors.at(key) - tensor).abs().max().item<double>();
    if (error <= bound * scale) continue;
    std::ostringstream text;
    text << key << " is off by " << error / scale << " of its largest, the bound is " << bound;
    return join(figure, text.str());
  }
  return figure;
}

}  // namespace lockstep::fuzz
