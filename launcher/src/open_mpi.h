#pragma once

#include <map>
#include <string>
#include <vector>

#include <lockstep/base/rank_info.h>

#include "hosts.h"

namespace lockstep::launcher {

/// One start under mpirun, of Open MPI 4.1 or 5. Each version reads only its own environment names (4.x OMPI_MCA_, 5.x
/// PRTE_MCA_ for what mpirun itself does), so no version has to be asked for.
struct MpirunStart {
  std::string mpirun;
  Placement placement;
  bool on_this_machine = true;  ///< all of it
  bool in_slurm = false;        ///< mpirun starts its daemons with srun
  bool tag_output = false, bind_to_cores = false;
  int cores = 1;                       ///< of this machine
  std::string hostfile;                ///< where to write one, on several hosts
  std::string session, shared_memory;  ///< places of this start (launch_folder.h); may be empty
};

/// What Open MPI should know, by environment. What the user has set stays: it is not in the answer.
std::map<std::string, std::string> open_mpi_environment(const MpirunStart& start, const Environment& user);
/// mpirun and its arguments, without the program. @param forwarded names of variables for ranks on other hosts.
std::vector<std::string> mpirun_command(const MpirunStart& start, const std::vector<std::string>& forwarded);
/// The hostfile's text.
std::string hostfile_text(const Placement& placement);

/// Names of variables, of "NAME=value" words, that ranks on other hosts get: Lockstep's, the math and communication
/// libraries', and where libraries lie. Others stay here, and so do names that sound like secrets.
std::vector<std::string> forwarded_variables(const char* const* environment);

/// What runs a command on another host: plm_rsh_agent (4.1) or plm_ssh_agent (5) of the environment, else ssh.
std::vector<std::string> remote_agent(const Environment& user, bool in_slurm);

/// This machine's address on the way to a host, as "10.77.0.254", and the network that leads there, as "10.77.0.0/24";
/// empty where nobody knows.
std::string own_address_to(const std::string& host);
std::string network_to(const std::string& host);

}  // namespace lockstep::launcher
