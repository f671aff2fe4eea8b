#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <future>
#include <map>
#include <random>
#include <sstream>

#include <unistd.h>

#include "batch_script.h"
#include "finding.h"
#include "machine.h"

namespace lockstep::launcher {
namespace {

using Words = std::vector<std::string>;

/// What one host said.
struct Look {
  std::string host;
  Answer doctor;
  std::vector<Finding> findings;  ///< empty: it did not answer
  double clock_ahead_s = 0, clock_within_s = 0;
  bool sees_file = false;
};

std::string self() { return std::filesystem::read_symlink("/proc/self/exe"); }

// A host that is silent must not keep the others waiting.
Answer ask_host(const Words& agent, const std::string& host, const Words& words) {
  Words command = {"timeout", "-k", "5", "60"};
  command.insert(command.end(), agent.begin(), agent.end());
  command.push_back(host);
  for (const std::string& word : words) command.push_back(has_shell(agent) ? quoted_for_bash(word) : word);
  return ask(command);
}

Look look_at(const std::string& host, const Words& agent, const Words& doctor, const std::string& file,
             const std::string& token) {
  Look look{.host = host, .doctor = ask_host(agent, host, doctor)};
  look.findings = parse_findings(look.doctor.output);
  if (look.findings.empty()) return look;
  const double before_s = unix_seconds();
  const double there_s = std::strtod(ask_host(agent, host, {"date", "+%s.%N"}).output.c_str(), nullptr);
  const double after_s = unix_seconds();
  look.clock_ahead_s = there_s - (before_s + after_s) / 2;
  look.clock_within_s = (after_s - before_s) / 2;
  look.sees_file = first_line(ask_host(agent, host, {"cat", file}).output) == token;
  return look;
}

std::string random_token() {
  std::random_device source;
  std::ostringstream token;
  for (int i = 0; i < 4; ++i) token << std::hex << source();
  return token.str();
}

std::vector<Look> look_at_all(const std::vector<Host>& hosts, const Words& agent, const std::string& run_dir,
                              const Words& doctor) {
  const std::string file = run_dir + "/.lockstep-doctor-shared-" + own_name() + "-" + std::to_string(::getpid()),
                    token = random_token();
  std::ofstream(file) << token << "\n";
  std::vector<std::future<Look>> asked;
  asked.reserve(hosts.size());
  for (const Host& host : hosts)
    asked.push_back(std::async(std::launch::async, look_at, host.name, agent, doctor, file, token));
  std::vector<Look> looks;
  looks.reserve(hosts.size());
  for (auto& one : asked) looks.push_back(one.get());
  std::error_code ignored;
  std::filesystem::remove(file, ignored);
  return looks;
}

Finding silent_host(const Look& look, const Words& agent) {
  if (look.doctor.exit_code == 127 || look.doctor.exit_code == 126)
    return {look.host, false, "has no " + self(), "install Lockstep there, at the same path"};
  const std::string said = look.doctor.exit_code == 124 ? "nothing within 60 s" : first_line(look.doctor.output);
  return {look.host, false, "does not answer: " + said,
          "`" + std::filesystem::path(agent[0]).filename().string() + " " + look.host +
              " true` must work without a password; else leave it out",
          ExitCode::kNodeBad};
}

void add_host(std::vector<Finding>& findings, const Look& look) {
  size_t good = 0;
  for (const Finding& finding : look.findings) good += finding.good ? 1 : 0;
  if (good == look.findings.size()) findings.push_back({look.host, true, std::to_string(good) + " checks", ""});
  for (Finding finding : look.findings) {
    if (finding.good) continue;
    finding.what = look.host + ": " + finding.what;
    findings.push_back(finding);
  }
}

// "4.1.4 on n1, n2; 5.0.5 on n3", or the one value alone.
Finding same_everywhere(const std::vector<Look>& looks, const std::string& what, const std::string& mend) {
  std::map<std::string, std::string> hosts_of;
  for (const Look& look : looks) {
    for (const Finding& finding : look.findings) {
      if (finding.what == what) hosts_of[finding.found] += (hosts_of[finding.found].empty() ? "" : ", ") + look.host;
    }
  }
  std::string found;
  for (const auto& [value, hosts] : hosts_of)
    found += (found.empty() ? "" : "; ") + value + (hosts_of.size() > 1 ? " on " + hosts : "");
  return {"same " + what, hosts_of.size() <= 1, found, mend};
}

Finding check_clocks(const std::vector<Look>& looks) {
  const Look* worst = nullptr;
  double widest_s = 0;
  const auto surely_off = [](const Look& look) { return std::abs(look.clock_ahead_s) - look.clock_within_s; };
  for (const Look& look : looks) {
    if (look.findings.empty()) continue;
    widest_s = std::max(widest_s, std::abs(look.clock_ahead_s) + look.clock_within_s);
    if (!worst || surely_off(look) > surely_off(*worst)) worst = &look;
  }
  const bool good = !worst || surely_off(*worst) <= 1;
  std::array<char, 128> found{};
  if (good)
    std::snprintf(found.data(), found.size(), "within %.1f s of this machine's", widest_s);
  else
    std::snprintf(found.data(), found.size(), "that of %.80s is %.1f s %s", worst->host.c_str(),
                  std::abs(worst->clock_ahead_s), worst->clock_ahead_s > 0 ? "ahead" : "behind");
  return {"clocks", good, found.data(), "start chronyd or another time service on every host", ExitCode::kNodeBad};
}

Finding check_sharing(const std::vector<Look>& looks, const std::string& run_dir) {
  std::string blind;
  for (const Look& look : looks) {
    if (!look.findings.empty() && !look.sees_file) blind += (blind.empty() ? "" : ", ") + look.host;
  }
  return {"shared storage", blind.empty(),
          blind.empty() ? run_dir + ", every host sees what this one writes"
                        : "a file written here to " + run_dir + " is not seen on " + blind,
          "name a folder with --run_dir that all hosts mount (NFS, Lustre, ...)"};
}

// Through the launcher, a rank a host: what it sets is what a run gets.
Finding check_all_reduce(const std::vector<Look>& looks) {
  std::string hosts;
  int ranks = 0;
  for (const Look& look : looks) {
    if (look.findings.empty()) continue;
    hosts += (hosts.empty() ? "" : ",") + look.host + ":1";
    ++ranks;
  }
  const std::string what = "all-reduce over " + std::to_string(ranks) + " hosts";
  const std::string probe = std::filesystem::path(self()).parent_path() / "all_reduce_probe";
  const Answer answer =
      ask({"timeout", "-k", "10", "60", self(), "run", "-n", std::to_string(ranks), "--hosts", hosts, "--", probe});
  const size_t at = answer.output.find("all-reduce ");
  if (answer.exit_code != 0 || at == std::string::npos)
    return {what, false, answer.exit_code == 124 ? "not done after 60 s" : answer.output.substr(0, 400),
            "open all TCP ports between the hosts, or say which network: OMPI_MCA_btl_tcp_if_include, "
            "OMPI_MCA_oob_tcp_if_include"};
  const double rate = std::strtod(answer.output.c_str() + at + 11, nullptr);
  return {what, rate >= 50, std::to_string(static_cast<int64_t>(rate)) + " MB/s for 16 MiB",
          "look for the faster network between them: OMPI_MCA_btl_tcp_if_include", ExitCode::kNodeBad};
}

}  // namespace

std::vector<Finding> examine_hosts(const std::vector<Host>& hosts, const Words& agent, const std::string& run_dir,
                                   const Words& doctor_flags) {
  Words doctor = {self(), "doctor", "--json"};
  doctor.insert(doctor.end(), doctor_flags.begin(), doctor_flags.end());
  const std::vector<Look> looks = look_at_all(hosts, agent, run_dir, doctor);
  std::vector<Finding> findings;
  size_t answered = 0;
  for (const Look& look : looks) {
    answered += look.findings.empty() ? 0 : 1;
    if (look.findings.empty())
      findings.push_back(silent_host(look, agent));
    else
      add_host(findings, look);
  }
  if (answered < 2) return findings;
  findings.push_back(same_everywhere(looks, "lockstep", "install one version on every host"));
  findings.push_back(same_everywhere(looks, "Open MPI", "install one version on every host"));
  findings.push_back(same_everywhere(looks, "NCCL", "install one version on every host"));
  findings.push_back(
      same_everywhere(looks, "instructions",
                      "leave the others out, or results have other bits: ATEN_CPU_CAPABILITY=avx2 makes them alike"));
  for (const Finding& finding : {check_clocks(looks), check_sharing(looks, run_dir), check_all_reduce(looks)})
    findings.push_back(finding);
  return findings;
}

}  // namespace lockstep::launcher
