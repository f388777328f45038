# The tools of the patches: replace a piece of upstream's text, and write the result where it differs.

# Replaces every `old` in the variable `text` by `new`. Stops the build unless it is found exactly `n` times: then
# upstream has changed there. Check that the patch is still right.
function(trio_replace text n old new)
  string(REPLACE "${old}" "" without "${${text}}")
  string(LENGTH "${${text}}" length)
  string(LENGTH "${without}" length_without)
  string(LENGTH "${old}" length_old)
  math(EXPR found "(${length} - ${length_without}) / ${length_old}")
  if(NOT found EQUAL n)
    message(FATAL_ERROR "llama.cpp has changed: look at ${CMAKE_CURRENT_LIST_FILE}. Found ${found} times:\n${old}")
  endif()
  string(REPLACE "${old}" "${new}" changed "${${text}}")
  set(${text} "${changed}" PARENT_SCOPE)
endfunction()

# Writes a file only if that changes it: otherwise Ninja would compile it again.
function(trio_write path content)
  set(old "")
  if(EXISTS ${path})
    file(READ ${path} old)
  endif()
  if(NOT old STREQUAL content)
    file(WRITE ${path} "${content}")
  endif()
endfunction()
