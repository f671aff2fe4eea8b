#include "open_mpi.h"

#include <algorithm>
#include <bit>
#include <cctype>
#include <memory>
#include <optional>
#include <sstream>

#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <ifaddrs.h>
#include <netdb.h>

#include <lockstep/base/unique_handle.h>

#include "machine.h"

namespace lockstep::launcher {
namespace {

using Settings = std::map<std::string, std::string>;

void for_both(Settings& settings, const std::string& name, const std::string& value) {
  settings["OMPI_MCA_" + name] = settings["PRTE_MCA_" + name] = value;
}

void for_one_machine(Settings& settings, const MpirunStart& start) {
  // Nothing but shared memory is needed, and looking for networks takes a third of a start.
  settings["OMPI_MCA_btl"] = "self,vader";
  settings["OMPI_MCA_plm"] = "isolated";
  if (!start.session.empty()) {
    settings["OMPI_MCA_orte_tmpdir_base"] = start.session;
    settings["PRTE_MCA_prte_tmpdir_base"] = settings["PMIX_MCA_pmix_server_tmpdir"] = start.session;
  }
  if (!start.shared_memory.empty())
    settings["OMPI_MCA_btl_vader_backing_directory"] = settings["OMPI_MCA_btl_sm_backing_directory"] =
        start.shared_memory;
}

void for_several_hosts(Settings& settings, const MpirunStart& start) {
  settings["OMPI_MCA_btl"] = "self,vader,tcp";
  // A host that falls silent is found in 6 s; the defaults take 8 minutes.
  for_both(settings, "oob_tcp_keepalive_time", "3");
  for_both(settings, "oob_tcp_keepalive_intvl", "1");
  for_both(settings, "oob_tcp_keepalive_probes", "3");
  std::string network;
  for (const Host& host : start.placement.hosts) {
    if (network.empty() && !is_this_machine(host.name)) network = network_to(host.name);
  }
  if (network.empty()) return;  // Open MPI looks for itself
  settings["OMPI_MCA_btl_tcp_if_include"] = settings["OMPI_MCA_oob_tcp_if_include"] = network;
  settings["PRTE_MCA_prte_if_include"] = network;
}

bool sounds_secret(std::string name) {
  std::transform(name.begin(), name.end(), name.begin(), [](unsigned char c) { return std::tolower(c); });
  for (const char* word : {"key", "token", "secret", "passw", "credential", "auth", "cookie"}) {
    if (name.find(word) != std::string::npos) return true;
  }
  return false;
}

std::optional<in_addr> own_address(const std::string& host) {
  addrinfo hints{}, *found = nullptr;
  hints.ai_family = AF_INET;
  hints.ai_socktype = SOCK_DGRAM;
  if (::getaddrinfo(host.c_str(), "9", &hints, &found) != 0) return std::nullopt;
  const std::unique_ptr<addrinfo, void (*)(addrinfo*)> guard(found, &::freeaddrinfo);
  // Connecting a datagram socket sends nothing; it only chooses the way.
  const UniqueFd fd(::socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0));
  sockaddr_in own{};
  socklen_t size = sizeof(own);
  if (!fd || ::connect(fd.get(), found->ai_addr, found->ai_addrlen) != 0 ||
      ::getsockname(fd.get(), reinterpret_cast<sockaddr*>(&own), &size) != 0)
    return std::nullopt;
  return own.sin_addr;
}

}  // namespace

std::map<std::string, std::string> open_mpi_environment(const MpirunStart& start, const Environment& user) {
  Settings settings = {{"OMPI_ALLOW_RUN_AS_ROOT", "1"},
                       {"OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1"},
                       {"OMPI_MCA_pml", "ob1"},
                       {"HWLOC_COMPONENTS", "-gl,-opencl"},  // no displays, no OpenCL
                       // Ranks whose job is lost have nothing to do in the second that 4.1 leaves them.
                       {"OMPI_MCA_odls_base_sigkill_timeout", "0"},
                       {"OMPI_MCA_rmaps_base_oversubscribe", "1"},
                       {"OMPI_MCA_rmaps_base_mapping_policy", "slot"},  // node-major
                       {"PRTE_MCA_rmaps_default_mapping_policy", "slot:oversubscribe"}};
  // Not by itself: Open MPI's default pins the first core for every job on the machine, and two jobs then share it.
  settings["OMPI_MCA_hwloc_base_binding_policy"] = settings["PRTE_MCA_hwloc_default_binding_policy"] =
      start.bind_to_cores ? "core" : "none";
  if (start.placement.ranks() > start.cores * static_cast<int64_t>(start.placement.hosts.size()))
    settings["OMPI_MCA_mpi_yield_when_idle"] = "1";  // a waiting rank must not keep the core from a working one
  start.on_this_machine ? for_one_machine(settings, start) : for_several_hosts(settings, start);
  std::erase_if(settings, [&](const auto& setting) { return user(setting.first.c_str()).has_value(); });
  return settings;
}

std::string hostfile_text(const Placement& placement) {
  std::string text;
  for (const Host& host : placement.hosts) text += host.name + " slots=" + std::to_string(host.slots) + "\n";
  return text;
}

std::vector<std::string> mpirun_command(const MpirunStart& start, const std::vector<std::string>& forwarded) {
  std::vector<std::string> command = {start.mpirun, "-n", std::to_string(start.placement.ranks())};
  if (start.tag_output) command.emplace_back("--tag-output");
  if (start.on_this_machine) return command;
  command.insert(command.end(), {"--hostfile", start.hostfile});
  for (const std::string& name : forwarded) command.insert(command.end(), {"-x", name});
  return command;
}

std::vector<std::string> forwarded_variables(const char* const* environment) {
  std::vector<std::string> names;
  for (; *environment; ++environment) {
    const std::string word = *environment, name = word.substr(0, word.find('='));
    bool is_wanted = name == "LD_LIBRARY_PATH";
    for (const char* prefix : {"LOCKSTEP_", "OMP_", "MKL_", "NCCL_", "UCX_", "FI_", "GLOG_", "HWLOC_"})
      is_wanted |= name.starts_with(prefix);
    if (is_wanted && !sounds_secret(name)) names.push_back(name);
  }
  std::sort(names.begin(), names.end());
  return names;
}

std::vector<std::string> remote_agent(const Environment& user, bool in_slurm) {
  if (in_slurm) return {"srun", "--overlap", "--mpi=none", "--nodes=1", "--ntasks=1", "-w"};
  std::string agent = "ssh";
  for (const char* name : {"OMPI_MCA_plm_rsh_agent", "OMPI_MCA_orte_rsh_agent", "PRTE_MCA_plm_ssh_agent"}) {
    if (const auto value = user(name); value && !value->empty()) agent = value->substr(0, value->find(" : "));
  }
  std::vector<std::string> words;
  std::istringstream stream(agent);
  for (std::string word; stream >> word;) words.push_back(word);
  if (!words.empty() && words[0].substr(words[0].rfind('/') + 1) == "ssh")
    words.insert(words.end(), {"-o", "BatchMode=yes"});  // nobody is there to type a password
  return words;
}

std::string own_address_to(const std::string& host) {
  const auto own = own_address(host);
  return own ? ipv4_text(*own) : "";
}

std::string network_to(const std::string& host) {
  const auto own = own_address(host);
  ifaddrs* interfaces = nullptr;
  if (!own || ::getifaddrs(&interfaces) != 0) return "";
  const std::unique_ptr<ifaddrs, void (*)(ifaddrs*)> interfaces_guard(interfaces, &::freeifaddrs);
  for (const ifaddrs* one = interfaces; one; one = one->ifa_next) {
    if (!one->ifa_addr || !one->ifa_netmask || one->ifa_addr->sa_family != AF_INET) continue;
    const auto* address = reinterpret_cast<const sockaddr_in*>(one->ifa_addr);
    if (address->sin_addr.s_addr != own->s_addr) continue;
    const uint32_t mask = reinterpret_cast<const sockaddr_in*>(one->ifa_netmask)->sin_addr.s_addr;
    return ipv4_text({own->s_addr & mask}) + "/" + std::to_string(std::popcount(mask));
  }
  return "";
}

}  // namespace lockstep::launcher
