#include <cctype>
#include <cstdlib>
#include <fstream>
#include <map>
#include <sstream>

#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <torch/headeronly/version.h>

#include <lockstep/collectives/arithmetic.h>

namespace lockstep {

void configure_arithmetic(int threads) {
  at::set_num_threads(threads);
  at::globalContext().setFlushDenormal(false);  // a library built with fast-math may have set it when it was loaded
  // Without it, the backward of x[index] adds in any order with two threads and more. Fresh memory needs no NaN fill.
  at::globalContext().setDeterministicFillUninitializedMemory(false);
  at::globalContext().setDeterministicAlgorithms(true, /*warn_only=*/true);
}

namespace {

struct Fact {
  std::string key, value, in_record;
};

// The first processor's.
std::string from_cpuinfo(const std::string& key) {
  std::ifstream cpuinfo("/proc/cpuinfo");
  for (std::string line; std::getline(cpuinfo, line);) {
    if (const size_t colon = line.find(':'); line.starts_with(key) && colon + 2 < line.size())
      return line.substr(colon + 2);
  }
  return "not known";
}

std::vector<Fact> facts_of(int threads) {
  const std::string number = std::to_string(threads), instructions = at::get_cpu_capability(),
                    cpu = from_cpuinfo("model name");
  std::vector<Fact> facts{{"torch", TORCH_VERSION, "torch " TORCH_VERSION},
                          {"instructions", instructions, instructions},
                          {"threads", number, "threads " + number},
                          {"cpu", cpu, cpu}};
  for (const char* name :
       {"ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS", "MKL_CBWR", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"}) {
    if (const char* value = std::getenv(name)) facts.push_back({name, value, std::string(name) + "=" + value});
  }
  return facts;
}

// What math libraries choose kernels by, without what only an operating system cares for.
std::string vector_flags() {
  std::istringstream flags(from_cpuinfo("flags"));
  std::string kept;
  for (std::string flag; flags >> flag;) {
    if (flag.starts_with("avx") || flag.starts_with("amx") || flag == "fma") kept += (kept.empty() ? "" : " ") + flag;
  }
  return kept;
}

std::map<std::string, std::string> parse(const std::string& facts) {
  std::map<std::string, std::string> values;
  std::istringstream lines(facts);
  for (std::string line; std::getline(lines, line);)
    values[line.substr(0, line.find(": "))] = line.substr(line.find(": ") + 2);
  return values;
}

}  // namespace

std::string arithmetic_record(int threads) {
  std::string record;
  for (const Fact& fact : facts_of(threads)) record += (record.empty() ? "" : ", ") + fact.in_record;
  return record;
}

std::string arithmetic_facts(int threads) {
  std::string lines;
  for (const Fact& fact : facts_of(threads)) lines += fact.key + ": " + fact.value + "\n";
  return lines + "cpu flags: " + vector_flags() + "\n";
}

std::string arithmetic_differences(const std::vector<std::string>& hosts, const std::vector<std::string>& facts) {
  const auto name = [&](size_t rank) { return "rank " + std::to_string(rank) + " (host " + hosts[rank] + ")"; };
  const auto first = parse(facts[0]);
  std::map<std::string, std::vector<size_t>> ranks;  // by what differs
  for (size_t rank = 1; rank < facts.size(); ++rank) {
    const auto theirs = parse(facts[rank]);
    auto keys = first;
    keys.insert(theirs.begin(), theirs.end());
    std::string difference;
    for (const auto& [key, any] : keys) {
      const std::string a = first.contains(key) ? first.at(key) : "not set",
                        b = theirs.contains(key) ? theirs.at(key) : "not set";
      if (a != b) difference.append("\n    ").append(key).append(": ").append(b).append(" against ").append(a);
    }
    if (!difference.empty()) ranks[difference].push_back(rank);
  }
  std::string text;
  for (const auto& [difference, who] : ranks) {
    const std::string more =
        who.size() == 1 ? "" : " and " + std::to_string(who.size() - 1) + " more, the last " + name(who.back());
    text.append("\n  " + name(who[0])).append(more).append(", against " + name(0) + ":").append(difference);
  }
  return text;
}

}  // namespace lockstep
