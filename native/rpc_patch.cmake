# ggml's RPC backend ends the process when a server is gone: on a thread of its own, where no guard of ours can be, and
# with others waiting for that thread for ever. What is compiled is a copy of it in which that thread says that it is
# gone, and the abort happens, and is caught, where the server was needed. And a server whose machine has vanished is
# missed within half a minute rather than never.

function(trio_replace text n old new)
  string(REPLACE "${old}" "" without "${${text}}")
  string(LENGTH "${${text}}" length)
  string(LENGTH "${without}" length_without)
  string(LENGTH "${old}" length_old)
  math(EXPR found "(${length} - ${length_without}) / ${length_old}")
  if(NOT found EQUAL n)
    message(FATAL_ERROR "llama.cpp's RPC backend has changed: look at native/rpc_patch.cmake. Found ${found} times:\n${old}")
  endif()
  string(REPLACE "${old}" "${new}" changed "${${text}}")
  set(${text} "${changed}" PARENT_SCOPE)
endfunction()

set(directory ${LLAMA_SOURCE}/ggml/src/ggml-rpc)
set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${directory}/ggml-rpc.cpp ${directory}/transport.cpp)

file(READ ${directory}/ggml-rpc.cpp rpc)
trio_replace(rpc 1 [=[
    void interrupt() {
        std::unique_lock<std::mutex> lock(mutex);
        interrupted = true;
        lock.unlock();
        cvar.notify_all();
]=] [=[
    std::queue<T> interrupt() { // returns what was not taken
        std::unique_lock<std::mutex> lock(mutex);
        interrupted = true;
        std::queue<T> rest;
        rest.swap(queue);
        lock.unlock();
        cvar.notify_all();
        return rest;
]=])
trio_replace(rpc 1 [=[
class rpc_dispatcher {
]=] [=[
[[noreturn]] static void rpc_server_is_gone() {
    GGML_ABORT("the rpc-server is gone");
}

template <typename F>
static void rpc_wait(F && future) {
    try {
        future.get();
    } catch (const std::exception &) {
        rpc_server_is_gone();
    }
}

class rpc_dispatcher {
]=])
trio_replace(rpc 1 [=[
    void start(const std::string & endpoint);
]=] [=[
    bool is_gone() const { return gone; }
    std::atomic_bool gone{false};
    void start(const std::string & endpoint);
]=])
trio_replace(rpc 2 [=[
                RPC_STATUS_ASSERT(status);
]=] [=[
                if (!status) {
                    gone = true;
                    const auto failure = std::make_exception_ptr(std::runtime_error("gone"));
                    msg_ptr->completion.set_exception(failure);
                    for (auto rest = queue.interrupt(); !rest.empty(); rest.pop()) {
                        rest.front()->completion.set_exception(failure);
                    }
                    return;
                }
]=])
trio_replace(rpc 5 "GGML_ASSERT(queue.push(msg));" "if (!queue.push(msg)) rpc_server_is_gone();")
trio_replace(rpc 2 "GGML_ASSERT(queue.push(ev->msg));" "if (!queue.push(ev->msg)) rpc_server_is_gone();")
trio_replace(rpc 2 "future.wait();" "rpc_wait(future);")
trio_replace(rpc 1 "msg->completion.get_future().wait();" "rpc_wait(msg->completion.get_future());")
trio_replace(rpc 1 "ev->sf.wait();" "rpc_wait(ev->sf);")
trio_replace(rpc 1 [=[
        if (auto dispatcher = it->second.lock()) {
            return dispatcher;
]=] [=[
        if (auto dispatcher = it->second.lock()) {
            if (!dispatcher->is_gone()) return dispatcher; // or it may be back
]=])
# Buffers are freed in destructors, also while an abort unwinds.
trio_replace(rpc 1 [=[
    ctx->dispatcher->send(RPC_CMD_FREE_BUFFER, request, sizeof(*request));
]=] [=[
    try {
        if (!ctx->dispatcher->is_gone()) ctx->dispatcher->send(RPC_CMD_FREE_BUFFER, request, sizeof(*request));
    } catch (...) {
    }
]=])

file(READ ${directory}/transport.cpp transport)
trio_replace(transport 1 [=[
static bool set_reuse_addr(]=] [=[
static void set_keep_alive(sockfd_t sockfd) {
    const auto set = [&](int level, int option, int value) {
        (void) setsockopt(sockfd, level, option, (char *) &value, sizeof(value));
    };
    set(SOL_SOCKET, SO_KEEPALIVE, 1);
#ifdef TCP_KEEPIDLE
    set(IPPROTO_TCP, TCP_KEEPIDLE, 10);
#elif defined(TCP_KEEPALIVE)
    set(IPPROTO_TCP, TCP_KEEPALIVE, 10);
#endif
#if defined(TCP_KEEPINTVL) && defined(TCP_KEEPCNT)
    set(IPPROTO_TCP, TCP_KEEPINTVL, 5);
    set(IPPROTO_TCP, TCP_KEEPCNT, 4);
#endif
#ifdef TCP_USER_TIMEOUT
    set(IPPROTO_TCP, TCP_USER_TIMEOUT, 30000);
#endif
}

static bool set_reuse_addr(]=])
trio_replace(transport 1 "    if (!set_no_delay(sockfd)) {" "    set_keep_alive(sockfd);
    if (!set_no_delay(sockfd)) {")

foreach(part rpc transport)
  set(file ${CMAKE_BINARY_DIR}/rpc/${part}.cpp)
  set(old "")
  if(EXISTS ${file})
    file(READ ${file} old)
  endif()
  if(NOT old STREQUAL "${${part}}") # or Ninja would compile it again
    file(WRITE ${file} "${${part}}")
  endif()
endforeach()
set_property(TARGET ggml-rpc PROPERTY SOURCES ${CMAKE_BINARY_DIR}/rpc/rpc.cpp ${CMAKE_BINARY_DIR}/rpc/transport.cpp)
target_include_directories(ggml-rpc PRIVATE ${directory})
target_compile_options(ggml-rpc PRIVATE -ffile-prefix-map=${CMAKE_BINARY_DIR}/rpc=ggml-rpc)
