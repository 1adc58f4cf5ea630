# libnarrowgauge_cuda.so: the same bindings, with the kernels compiled by nvcc.
include(CheckLanguage)

if(NOT NARROWGAUGE_CUDA)
    list(APPEND summary "CUDA library not built (NARROWGAUGE_CUDA=${NARROWGAUGE_CUDA})")
    return()
endif()
check_language(CUDA)
if(NOT CMAKE_CUDA_COMPILER)
    if(NARROWGAUGE_CUDA STREQUAL "AUTO")
        list(APPEND summary "CUDA library not built (no nvcc; set CUDACXX or PATH)")
        return()
    endif()
    message(FATAL_ERROR "NARROWGAUGE_CUDA=${NARROWGAUGE_CUDA}, but no nvcc was found; set CUDACXX or PATH")
endif()

include(cmake/torch.cmake)
set(CMAKE_CUDA_ARCHITECTURES ${NARROWGAUGE_CUDA_ARCHS})
set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
set(CMAKE_CUDA_STANDARD 17)
set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
enable_language(CUDA)
find_package(CUDAToolkit REQUIRED)

list(JOIN NARROWGAUGE_CUDA_ARCHS ", " archs)
string(REGEX REPLACE "([0-9]+[a-z]?)-real" "sm_\\1" archs "${archs}")
string(REGEX REPLACE "([0-9]+[a-z]?)-virtual" "compute_\\1" archs "${archs}")
add_native_library(cuda NARROWGAUGE_CUDA
    "\"cuda\": \"${CMAKE_CUDA_COMPILER_VERSION}\", \"cuda_architectures\": \"${archs}\"")
list(APPEND summary "CUDA library nvcc ${CMAKE_CUDA_COMPILER_VERSION}, ${archs}")
target_compile_definitions(narrowgauge_cuda PRIVATE USE_CUDA)
target_include_directories(narrowgauge_cuda SYSTEM PRIVATE ${CUDAToolkit_INCLUDE_DIRS})

if(EXISTS ${torch_dir}/lib/libtorch_cuda.so)
    target_link_libraries(narrowgauge_cuda PRIVATE ${torch_dir}/lib/libtorch_cuda.so)
else()
    # A CPU-only torch: an import stub with the right soname, and every CUDA function the shim headers declare.
    set(stub "")
    foreach(header torch/csrc/inductor/aoti_torch/c/shim.h torch/csrc/stable/c/shim.h)
        file(READ ${torch_dir}/include/${header} text)
        string(REGEX MATCHALL "[^a-z0-9_](aoti_)?torch_[a-z0-9_]*cuda[a-z0-9_]*\\(" names "${text}")
        foreach(name IN LISTS names)
            string(REGEX REPLACE "[^a-z0-9_]" "" name "${name}")
            if(NOT name STREQUAL "aoti_torch_device_type_cuda") # lives in libtorch_cpu.so
                string(APPEND stub "extern \"C\" __attribute__((visibility(\"default\"))) void ${name}() {}\n")
            endif()
        endforeach()
    endforeach()
    file(CONFIGURE OUTPUT torch_cuda_stub.cpp CONTENT "${stub}" @ONLY)
    add_library(torch_cuda SHARED ${CMAKE_CURRENT_BINARY_DIR}/torch_cuda_stub.cpp)
    set_target_properties(torch_cuda PROPERTIES LIBRARY_OUTPUT_DIRECTORY ${PROJECT_BINARY_DIR}/stub)
    target_link_libraries(narrowgauge_cuda PRIVATE torch_cuda)
endif()

if(cuda_kernels)
    add_library(cuda_kernels OBJECT ${cuda_kernels})
    target_compile_definitions(cuda_kernels PRIVATE NARROWGAUGE_CUDA=1 NDEBUG)
    target_compile_options(cuda_kernels PRIVATE -O3 --fmad=false -lineinfo -Xptxas=-v -Xcompiler=-Wall,-ffp-contract=off
        $<$<VERSION_GREATER_EQUAL:${CMAKE_CUDA_COMPILER_VERSION},12.8>:--compress-mode=size>) # an eighth of the size
    target_link_libraries(cuda_kernels PRIVATE flags)
    # ptxas reports registers and spills on stderr: the launcher keeps that beside each object, the report gathers it.
    set_target_properties(cuda_kernels PROPERTIES
        CUDA_COMPILER_LAUNCHER "${Python_EXECUTABLE};${PROJECT_SOURCE_DIR}/tools/ptxas_report.py;--run")
    target_link_libraries(narrowgauge_cuda PRIVATE cuda_kernels)
    add_custom_command(TARGET narrowgauge_cuda POST_BUILD VERBATIM COMMAND_EXPAND_LISTS
        COMMAND ${Python_EXECUTABLE} ${PROJECT_SOURCE_DIR}/tools/ptxas_report.py
            --json ${PROJECT_BINARY_DIR}/ptxas.json $<TARGET_OBJECTS:cuda_kernels>)
endif()
