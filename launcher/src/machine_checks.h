#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "finding.h"

namespace lockstep::launcher {

/// Bytes that the cgroup (v2) at `folder` may still take before its limit, what it could drop from its file cache
/// included; nullopt: no limit. Source: docs.kernel.org/admin-guide/cgroup-v2.html, "Memory Interface Files".
std::optional<uint64_t> memory_free_of_cgroup(const std::string& folder);

// What `lockstep doctor` looks at on this machine and a start looks at too, in milliseconds. A start bears with less.
Finding check_memory(uint64_t least_mib = 1024);
Finding check_shared_memory(uint64_t least_mib = 64);
Finding check_open_files();
Finding check_clock();
/// 64 MiB written and synced: what a checkpoint will feel.
Finding check_storage(const std::string& folder);
/// Whether `folder`, or the nearest folder there is in which it would be made, can be written at all. A bad one
/// `ends_run` where trying again would not help.
Finding check_writable(const std::string& folder);

/// `lockstep doctor --short`, and what `lockstep run` does before its first start. Cost: 1 ms.
/// @param run_dir absolute; empty: not known.
std::vector<Finding> short_look(const std::string& run_dir);

/// What to have run on another host, so that it answers and says its short_look() as JSON if lockstep is there too.
/// @param agent that takes it there: ssh hands words to a shell, srun does not.
std::vector<std::string> short_look_command(const std::vector<std::string>& agent, const std::string& run_dir);

}  // namespace lockstep::launcher
