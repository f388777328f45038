# Plugins are built only if they are named as targets.
#
# Why: upstream makes libggml depend on every loadable backend it defines. Asking for the library would then build all
# fourteen x86 variants of the CPU plugin. Nothing links to plugins, they are opened by name at run time. So the
# dependency is dropped here, and the build names the plugins it wants as Ninja targets.
# Until: upstream no longer attaches plugins to `ggml` with add_dependencies.

function(add_dependencies target)
  if(NOT target STREQUAL "ggml")
    _add_dependencies(${target} ${ARGN}) # CMake keeps an overridden command under its name with an underscore in front
  endif()
endfunction()
