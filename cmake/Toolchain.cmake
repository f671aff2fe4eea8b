# Compiler and link settings shared by every target. They live in one interface target, lockstep_options, so that no folder edits flags.
set(CMAKE_CXX_STANDARD 20)
set(CMAKE_CXX_STANDARD_REQUIRED ON)
set(CMAKE_CXX_EXTENSIONS OFF)
set(CMAKE_EXPORT_COMPILE_COMMANDS ON)
set(CMAKE_VERIFY_INTERFACE_HEADER_SETS ON)
set(CMAKE_RUNTIME_OUTPUT_DIRECTORY "${PROJECT_BINARY_DIR}/bin")
set(CMAKE_LIBRARY_OUTPUT_DIRECTORY "${PROJECT_BINARY_DIR}/lib")
set(CMAKE_INSTALL_RPATH "$ORIGIN/../${CMAKE_INSTALL_LIBDIR};$ORIGIN;${LOCKSTEP_DEPS_DIR}/torch/lib")
if(NOT CMAKE_BUILD_TYPE)
  set(CMAKE_BUILD_TYPE Release CACHE STRING "" FORCE)
endif()
set(CMAKE_CXX_FLAGS_RELEASE "-O2 -DNDEBUG")
set(CMAKE_CXX_FLAGS_DEBUG "-O0 -g1")

find_program(CCACHE ccache)
if(CCACHE)
  # The slack is what ccache's manual asks for when a precompiled header is in use.
  set(CMAKE_CXX_COMPILER_LAUNCHER "${CMAKE_COMMAND}" -E env CCACHE_SLOPPINESS=pch_defines,time_macros,include_file_mtime,include_file_ctime
      "CCACHE_BASEDIR=${PROJECT_SOURCE_DIR}" CCACHE_NOHASHDIR=1 "${CCACHE}")
endif()

add_library(lockstep_options INTERFACE)
target_compile_options(lockstep_options INTERFACE
  -Wall -Wextra -Werror -Wno-missing-field-initializers  # members left out of a designated initializer keep their defaults
  -fPIC                  # one code model, so that one precompiled header serves libraries and programs
  -ffp-contract=off      # the compiler may not fuse a*b+c: bits must not depend on where a loop is vectorised
  -fstack-protector-strong
  $<$<CXX_COMPILER_ID:GNU>:--param=ggc-min-heapsize=1000000>  # GCC's own garbage is collected past 1 GB: a tenth off the build for 200 MB
  $<$<AND:$<CONFIG:Release>,$<STREQUAL:${LOCKSTEP_SANITIZER},>>:-D_FORTIFY_SOURCE=2>)
target_compile_definitions(lockstep_options INTERFACE C10_USE_GLOG OMPI_SKIP_MPICXX)
target_link_options(lockstep_options INTERFACE -Wl,-z,relro,-z,now)
find_program(MOLD mold)
if(MOLD)
  target_link_options(lockstep_options INTERFACE -fuse-ld=mold)
endif()
if(LOCKSTEP_SANITIZER)
  target_compile_definitions(lockstep_options INTERFACE LOCKSTEP_SANITIZED)
endif()
if(LOCKSTEP_SANITIZER STREQUAL "address")  # clang's; -fsanitize=fuzzer itself, which brings a main(), is for the fuzz targets alone
  target_compile_options(lockstep_options INTERFACE -fsanitize=fuzzer-no-link,address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer)
  target_link_options(lockstep_options INTERFACE -fsanitize=address,undefined)
elseif(LOCKSTEP_SANITIZER STREQUAL "thread")
  target_compile_options(lockstep_options INTERFACE -fsanitize=thread -fno-omit-frame-pointer)
  target_link_options(lockstep_options INTERFACE -fsanitize=thread)
endif()
