# Target lockstep::torch_cpu: torch_cpu and c10 alone, so that no CUDA library reaches the core. Used by the build and by the installed package.
if(NOT TARGET lockstep::torch_cpu)
  add_library(lockstep::torch_cpu INTERFACE IMPORTED GLOBAL)
  set_target_properties(lockstep::torch_cpu PROPERTIES
    INTERFACE_INCLUDE_DIRECTORIES "${LOCKSTEP_TORCH_DIR}/include;${LOCKSTEP_TORCH_DIR}/include/torch/csrc/api/include"
    INTERFACE_SYSTEM_INCLUDE_DIRECTORIES "${LOCKSTEP_TORCH_DIR}/include;${LOCKSTEP_TORCH_DIR}/include/torch/csrc/api/include"
    INTERFACE_COMPILE_DEFINITIONS "USE_DISTRIBUTED;USE_C10D_GLOO;USE_RPC;USE_TENSORPIPE;C10_USE_GLOG"
    INTERFACE_LINK_LIBRARIES "${LOCKSTEP_TORCH_DIR}/lib/libtorch_cpu.so;${LOCKSTEP_TORCH_DIR}/lib/libc10.so;glog::glog"
    # libcudart and libcupti, which torch_cpu needs, are found by torch_cpu's own run path; the linker wants to be told.
    INTERFACE_LINK_OPTIONS "-Wl,-rpath-link,${LOCKSTEP_TORCH_DIR}/../nvidia/cu13/lib;-Wl,--allow-shlib-undefined")
endif()
