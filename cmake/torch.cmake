# The target `stable_torch`: torch's headers, and libtorch_cpu.so by its soname alone.
include_guard()

execute_process(
    COMMAND ${Python_EXECUTABLE} ${PROJECT_SOURCE_DIR}/cmake/find_torch.py
    OUTPUT_VARIABLE found
    COMMAND_ERROR_IS_FATAL ANY)
list(POP_FRONT found torch_dir torch_version torch_cuda)
list(APPEND summary "torch        ${torch_version}, ${torch_dir}")

add_library(stable_torch INTERFACE)
target_include_directories(stable_torch SYSTEM INTERFACE ${torch_dir}/include)
target_compile_definitions(stable_torch INTERFACE TORCH_TARGET_VERSION=0x020a000000000000)
target_link_libraries(stable_torch INTERFACE ${torch_dir}/lib/libtorch_cpu.so)
# Everything must resolve at link time, and nothing but narrowgauge_* is exported: inline standard-library
# functions compiled here must not replace those of another library in the process.
target_link_options(stable_torch INTERFACE
    -Wl,--no-as-needed -Wl,-z,defs -Wl,--exclude-libs,ALL -Wl,--version-script=${PROJECT_SOURCE_DIR}/cmake/exports.map)

# A library of bindings: libnarrowgauge_<backend>.so
function(add_native_library backend macro info)
    set(target narrowgauge_${backend})
    set(NARROWGAUGE_BUILD_INFO "${info}")
    configure_file(${PROJECT_SOURCE_DIR}/cmake/build_info.cpp.in build_info_${backend}.cpp @ONLY)
    add_library(${target} MODULE ${bindings} ${common_sources} ${CMAKE_CURRENT_BINARY_DIR}/build_info_${backend}.cpp)
    set_target_properties(${target} PROPERTIES PREFIX lib LIBRARY_OUTPUT_DIRECTORY ${PROJECT_BINARY_DIR}/lib)
    target_compile_definitions(${target} PRIVATE ${macro}=1 NDEBUG)
    target_compile_options(${target} PRIVATE $<$<COMPILE_LANGUAGE:CXX>:-O2>)
    target_link_libraries(${target} PRIVATE flags stable_torch)
    install(TARGETS ${target} LIBRARY DESTINATION .)
endfunction()
