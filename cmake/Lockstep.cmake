# The build's verbs: lockstep_add_library, lockstep_add_program, lockstep_add_test. Folders list their files; everything else is here.
include(Layers)
include(CMakePackageConfigHelpers)

# Precompiled headers, each compiled once and shared by all who use it:
#   torch   TORCH_PCH: the core of LibTorch, where nn::Module is needed. 20 s to parse, 3 s from here, which go into GCC's instantiations of
#           what is in it: all of torch/torch.h would cost each file another 3 s.
#   tensor  TENSOR_PCH: at::Tensor alone, half a second.
#   gtest   tests; tensor_gtest: those with TENSOR_PCH.
function(lockstep_add_pch name)
  cmake_parse_arguments(arg "" "" "HEADERS;LINKS;OPTIONS" ${ARGN})
  add_library(lockstep_${name}_pch OBJECT EXCLUDE_FROM_ALL "${CMAKE_CURRENT_FUNCTION_LIST_DIR}/empty.cc")
  target_link_libraries(lockstep_${name}_pch PRIVATE lockstep_options ${arg_LINKS})
  target_compile_options(lockstep_${name}_pch PRIVATE ${arg_OPTIONS})
  target_precompile_headers(lockstep_${name}_pch PRIVATE ${arg_HEADERS})
endfunction()

# Tests compile fast; what they test keeps its optimisation.
set(LOCKSTEP_TEST_OPTIMISATION $<IF:$<CONFIG:Release>,-O1,-O0>)
lockstep_add_pch(torch LINKS lockstep::torch_cpu HEADERS <torch/types.h> <torch/autograd.h> <torch/nn/module.h>)
lockstep_add_pch(tensor LINKS lockstep::torch_cpu HEADERS <ATen/core/Tensor.h>)
if(LOCKSTEP_BUILD_TESTS)
  lockstep_add_pch(gtest LINKS GTest::gmock OPTIONS ${LOCKSTEP_TEST_OPTIMISATION} HEADERS <gmock/gmock.h> <gtest/gtest.h>)
  lockstep_add_pch(tensor_gtest LINKS lockstep::torch_cpu GTest::gmock OPTIONS ${LOCKSTEP_TEST_OPTIMISATION}
                   HEADERS <ATen/core/Tensor.h> <gmock/gmock.h> <gtest/gtest.h>)
endif()

function(lockstep_use_pch target name)
  target_precompile_headers(${target} REUSE_FROM lockstep_${name}_pch)
endfunction()

function(lockstep_use_torch_pch target)
  lockstep_use_pch(${target} torch)
  target_link_libraries(${target} PRIVATE lockstep::torch_cpu)
endfunction()

# Several sources to a compile, but for those with options of their own and in the dev preset. `make lint` looks at each alone.
function(lockstep_compile_together target)
  set_target_properties(${target} PROPERTIES UNITY_BUILD ${LOCKSTEP_UNITY} UNITY_BUILD_BATCH_SIZE 8)
  target_compile_options(${target} PRIVATE $<$<CXX_COMPILER_ID:GNU>:-Wno-subobject-linkage>)  # meant for headers; takes an included source for one
endfunction()

# lockstep_add_library(name HEADERS include/lockstep/name/x.h... SOURCES src/x.cc... PUBLIC targets... PRIVATE targets... [TORCH_PCH | TENSOR_PCH])
function(lockstep_add_library name)
  cmake_parse_arguments(arg "TORCH_PCH;TENSOR_PCH" "" "HEADERS;SOURCES;PUBLIC;PRIVATE" ${ARGN})
  lockstep_check_layers(${name} "${arg_PUBLIC};${arg_PRIVATE}")
  if(arg_SOURCES)
    add_library(lockstep_${name} SHARED ${arg_SOURCES})
    set(scope PUBLIC)
    target_link_libraries(lockstep_${name} PRIVATE "$<BUILD_INTERFACE:lockstep_options>")
  else()
    add_library(lockstep_${name} INTERFACE)
    set(scope INTERFACE)
  endif()
  add_library(lockstep::${name} ALIAS lockstep_${name})
  set_target_properties(lockstep_${name} PROPERTIES EXPORT_NAME ${name} VERSION ${PROJECT_VERSION} SOVERSION 0)
  target_sources(lockstep_${name} ${scope} FILE_SET HEADERS BASE_DIRS include FILES ${arg_HEADERS})
  target_compile_features(lockstep_${name} ${scope} cxx_std_20)
  target_link_libraries(lockstep_${name} ${scope} ${arg_PUBLIC})
  if(arg_PRIVATE)
    target_link_libraries(lockstep_${name} PRIVATE ${arg_PRIVATE})
  endif()
  if(arg_SOURCES)
    target_include_directories(lockstep_${name} PRIVATE src)
    lockstep_compile_together(lockstep_${name})
  endif()
  if(arg_TORCH_PCH)
    lockstep_use_torch_pch(lockstep_${name})
  elseif(arg_TENSOR_PCH)
    lockstep_use_pch(lockstep_${name} tensor)
  endif()
  set_property(GLOBAL APPEND PROPERTY LOCKSTEP_INSTALL_TARGETS lockstep_${name})
  set_property(GLOBAL APPEND PROPERTY LOCKSTEP_LIBRARIES ${name})
endfunction()

# lockstep_add_program(name SOURCES... LINKS... [TORCH_PCH]): lands in <build>/bin/<name> and is installed.
function(lockstep_add_program name)
  cmake_parse_arguments(arg "TORCH_PCH" "" "SOURCES;LINKS" ${ARGN})
  add_executable(${name} ${arg_SOURCES})
  target_link_libraries(${name} PRIVATE lockstep_options ${arg_LINKS})
  if(arg_TORCH_PCH)
    lockstep_use_torch_pch(${name})
  endif()
  install(TARGETS ${name} RUNTIME DESTINATION ${CMAKE_INSTALL_BINDIR})
endfunction()

# lockstep_add_test(name SOURCES... LINKS... [WORLD_SIZES 1 2 3] [ARGS...] [TIMEOUT s] [PROCESSORS n] [LABELS...]
#                   [TORCH_PCH | TENSOR_PCH] [TORCH_FREE] [SANITIZED] [DEEP])
#   Without WORLD_SIZES: one ctest of a GoogleTest binary, <name>_test.
#   With WORLD_SIZES: the binary brings its own main (tests/support/mpi_main.cc) and runs under mpirun once for each size.
#   PROCESSORS 2: keeps two cores busy (measured), so nothing runs beside it where there are two. Ranks that mostly wait are 1.
#   TORCH_FREE: also built and run by `make test` under the sanitizers. SANITIZED: by `make deep`.
#   DEEP: only with LOCKSTEP_DEEP, as `make deep` sets it.
function(lockstep_add_test name)
  cmake_parse_arguments(arg "TORCH_PCH;TENSOR_PCH;TORCH_FREE;SANITIZED;DEEP" "TIMEOUT;PROCESSORS" "SOURCES;LINKS;WORLD_SIZES;ARGS;LABELS;DEPENDS" ${ARGN})
  if(NOT LOCKSTEP_BUILD_TESTS OR (arg_DEEP AND NOT LOCKSTEP_DEEP))
    return()
  endif()
  if(NOT arg_TIMEOUT)
    set(arg_TIMEOUT 120)
  endif()
  if(LOCKSTEP_SANITIZER)
    math(EXPR arg_TIMEOUT "5 * ${arg_TIMEOUT}")
  endif()
  if(NOT arg_PROCESSORS)
    set(arg_PROCESSORS 1)
  endif()
  set(target ${name}_test)
  add_executable(${target} ${arg_SOURCES})
  set_target_properties(${target} PROPERTIES RUNTIME_OUTPUT_DIRECTORY "${PROJECT_BINARY_DIR}/tests")
  target_link_libraries(${target} PRIVATE lockstep_options ${arg_LINKS} GTest::gtest GTest::gmock)
  target_compile_definitions(${target} PRIVATE "LOCKSTEP_SOURCE_DIR=\"${PROJECT_SOURCE_DIR}\"" "LOCKSTEP_BINARY_DIR=\"${PROJECT_BINARY_DIR}\"")
  if(arg_TORCH_PCH)
    lockstep_use_torch_pch(${target})
  elseif(arg_TENSOR_PCH)
    lockstep_use_pch(${target} tensor_gtest)
  else()
    lockstep_use_pch(${target} gtest)
  endif()
  target_compile_options(${target} PRIVATE ${LOCKSTEP_TEST_OPTIMISATION})
  lockstep_compile_together(${target})
  if(arg_DEPENDS)
    add_dependencies(${target} ${arg_DEPENDS})
  endif()
  if(arg_TORCH_FREE OR (arg_SANITIZED AND LOCKSTEP_DEEP))
    list(APPEND arg_LABELS sanitized)
    set_property(GLOBAL APPEND PROPERTY LOCKSTEP_SANITIZED_TESTS ${target})
  endif()
  if(arg_WORLD_SIZES)
    target_link_libraries(${target} PRIVATE lockstep_mpi_main)
    foreach(size IN LISTS arg_WORLD_SIZES)
      add_test(NAME ${name}.np${size}
               COMMAND "${PROJECT_SOURCE_DIR}/tests/support/mpirun.sh" ${size} $<TARGET_FILE:${target}> ${arg_ARGS})
      set_tests_properties(${name}.np${size} PROPERTIES TIMEOUT ${arg_TIMEOUT} PROCESSORS ${arg_PROCESSORS} LABELS "${arg_LABELS};mpi"
                           SKIP_REGULAR_EXPRESSION "\\[  SKIPPED \\] [1-9]")
    endforeach()
  else()
    target_link_libraries(${target} PRIVATE GTest::gtest_main)
    add_test(NAME ${name} COMMAND ${target} ${arg_ARGS})
    set_tests_properties(${name} PROPERTIES TIMEOUT ${arg_TIMEOUT} PROCESSORS ${arg_PROCESSORS} LABELS "${arg_LABELS};unit")
  endif()
endfunction()

# lockstep_objects(OUT TARGET NAME...): what TARGET made of its NAME.cc..., for tests of its parts: nothing is compiled twice.
function(lockstep_objects out target)
  list(JOIN ARGN "|" names)
  set(${out} "$<FILTER:$<TARGET_OBJECTS:${target}>,INCLUDE,/(${names})\\.cc>" PARENT_SCOPE)
endfunction()

# After all folders: install, export, and the config file behind find_package(lockstep).
function(lockstep_install_package)
  get_property(targets GLOBAL PROPERTY LOCKSTEP_INSTALL_TARGETS)
  install(TARGETS ${targets} EXPORT lockstep LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR}
          FILE_SET HEADERS DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
  install(EXPORT lockstep NAMESPACE lockstep:: DESTINATION ${CMAKE_INSTALL_LIBDIR}/cmake/lockstep FILE lockstepTargets.cmake)
  configure_package_config_file(cmake/lockstepConfig.cmake.in "${PROJECT_BINARY_DIR}/lockstepConfig.cmake"
                                INSTALL_DESTINATION ${CMAKE_INSTALL_LIBDIR}/cmake/lockstep)
  write_basic_package_version_file("${PROJECT_BINARY_DIR}/lockstepConfigVersion.cmake" COMPATIBILITY SameMinorVersion)
  install(FILES "${PROJECT_BINARY_DIR}/lockstepConfig.cmake" "${PROJECT_BINARY_DIR}/lockstepConfigVersion.cmake"
                "${PROJECT_SOURCE_DIR}/cmake/LibTorchTarget.cmake" DESTINATION ${CMAKE_INSTALL_LIBDIR}/cmake/lockstep)
  get_property(sanitized GLOBAL PROPERTY LOCKSTEP_SANITIZED_TESTS)
  if(sanitized)
    add_custom_target(sanitized_tests DEPENDS ${sanitized})
  endif()
endfunction()

function(lockstep_print_summary)
  get_property(cuda GLOBAL PROPERTY LOCKSTEP_CUDA_FOUND)
  if(NOT cuda)
    if(LOCKSTEP_CUDA_MISSING)
      set(cuda "left out, not found:${LOCKSTEP_CUDA_MISSING}; CPU parts are complete")
    else()
      set(cuda "left out (LOCKSTEP_CUDA=OFF); CPU parts are complete")
    endif()
  endif()
  message(STATUS "lockstep ${PROJECT_VERSION}: ${CMAKE_BUILD_TYPE}, LibTorch at ${LOCKSTEP_TORCH_DIR}, MPI ${MPI_CXX_LIBRARY_VERSION_STRING}${MPI_CXX_VERSION}")
  message(STATUS "CUDA plug-in: ${cuda}")
endfunction()
