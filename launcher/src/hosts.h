#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include <lockstep/base/rank_info.h>

namespace lockstep::launcher {

/// A machine, and how many ranks it may hold.
struct Host {
  std::string name;
  int64_t slots = 0;
  friend bool operator==(const Host&, const Host&) = default;
};

/// "a:4,b:4,c": Open MPI's --host; a host without a number counts one slot, one that comes again adds its slots.
/// @throws ConfigError with the mend; names other than letters, digits, '.', '-', '_' are refused: they reach a shell
/// on the way to the other host.
std::vector<Host> parse_host_list(const std::string& list);
/// Open MPI's hostfile: "NAME [slots=N]" lines, # comments. Without slots= a host holds `cores` ranks.
/// @throws ConfigError naming the line.
std::vector<Host> parse_hostfile(const std::string& text, int64_t cores);
/// Slurm's counts of a list of nodes: "4(x2),3" is 4, 4, 3. @throws ConfigError.
std::vector<int64_t> parse_slurm_counts(const std::string& counts);
/// The allocation this process runs in; empty outside of one. `expand` is given SLURM_JOB_NODELIST ("n[1-3]") and
/// returns its names ("scontrol show hostnames").
std::vector<Host> slurm_hosts(const Environment& environment,
                              std::vector<std::string> (*expand)(const std::string& node_list));

int64_t total_slots(const std::vector<Host>& hosts);

/// Which ranks run where: node-major, host after host in the order given, each filled before the next.
struct Placement {
  std::vector<Host> hosts;          ///< slots: the ranks it gets
  std::vector<std::string> spares;  ///< they would be next
  int64_t ranks() const { return total_slots(hosts); }
  const std::string& host_of(int64_t rank) const;
  std::string describe() const;  ///< "ranks 0-3 on a, 4-7 on b; spare: c"
};

/// The largest world from `most` down to `least` that fits and has not been refused by the program.
/// @return nullopt where none is left.
std::optional<Placement> place(const std::vector<Host>& hosts, int64_t most, int64_t least,
                               const std::set<int64_t>& refused);

std::string own_name();  ///< of this machine
/// Whether that name means this machine.
bool is_this_machine(const std::string& name);
/// Whether what `agent` takes to a host is read by a shell there: ssh does that, srun does not.
bool has_shell(const std::vector<std::string>& agent);
/// Those of `hosts` that answer: `agent` HOST `command` (ssh, or what stands for it) ends with 0 in time. All are asked
/// at once; this machine is not asked.
/// @param said what they write to their standard output, 64 KiB at most; more is no answer. Of 256 hosts at most.
std::vector<Host> answering(const std::vector<Host>& hosts, const std::vector<std::string>& agent, double seconds,
                            const std::vector<std::string>& command = {"true"},
                            std::map<std::string, std::string>* said = nullptr);

}  // namespace lockstep::launcher
