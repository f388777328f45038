# ggml's RPC backend ends the process when a server is gone: on a thread of its own, where no guard of ours can be, and
# with others waiting for that thread for ever. What is compiled is a copy of it in which that thread says why it has
# given up, and those who need the server throw that. A server whose machine has vanished is missed within half a minute,
# one that hangs after TRIO_RUNNER_RPC_SECONDS, and one that does not begin to answer after ten; upstream waits for ever.

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
set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${directory}/ggml-rpc.cpp ${directory}/transport.cpp
             ${directory}/transport.h)

file(READ ${directory}/ggml-rpc.cpp rpc)
trio_replace(rpc 1 "    void interrupt() {" "    std::queue<T> interrupt() { // returns what was not taken")
trio_replace(rpc 1 [=[
        lock.unlock();
        cvar.notify_all();
]=] [=[
        std::queue<T> rest;
        rest.swap(queue);
        lock.unlock();
        cvar.notify_all();
        return rest;
]=])
trio_replace(rpc 1 [=[
    void start(const std::string & endpoint);
]=] [=[
    bool is_gone() const { return gone; }
    [[noreturn]] void fail() const { std::rethrow_exception(failure); }
    std::string endpoint;
    std::exception_ptr failure; // for good once `gone` is true, and when the queue takes nothing more
    std::atomic_bool gone{false};
    std::mutex graphs_mutex;                       // held until what it is about is sent
    std::unordered_map<uint32_t, uint64_t> graphs; // that the server has, by their devices
    void start(const std::string & endpoint);
]=])
trio_replace(rpc 2 "bool status = send_rpc_cmd(sock, msg_ptr->cmd" "const auto begin = std::chrono::steady_clock::now();
                bool status = send_rpc_cmd(sock, msg_ptr->cmd")
trio_replace(rpc 2 [=[
                RPC_STATUS_ASSERT(status);
]=] [=[
                if (!status) {
                    const std::chrono::seconds patience(rpc_seconds());
                    const bool hangs = std::chrono::steady_clock::now() - begin >= patience;
                    failure = std::make_exception_ptr(std::runtime_error(
                        "the rpc-server " + endpoint +
                        (hangs ? " has not answered for " + std::to_string(patience.count()) + " seconds" : " is gone")));
                    gone = true;
                    msg_ptr->completion.set_exception(failure);
                    for (auto rest = queue.interrupt(); !rest.empty(); rest.pop()) {
                        rest.front()->completion.set_exception(failure);
                    }
                    sock->hang_up(); // it may still be there, and be asked for by others
                    return;
                }
]=])
trio_replace(rpc 5 "GGML_ASSERT(queue.push(msg));" "if (!queue.push(msg)) fail();")
trio_replace(rpc 2 "GGML_ASSERT(queue.push(ev->msg));" "if (!queue.push(ev->msg)) fail();")
trio_replace(rpc 2 "future.wait();" "future.get();")
trio_replace(rpc 1 "msg->completion.get_future().wait();" "msg->completion.get_future().get();")
trio_replace(rpc 1 "ev->sf.wait();" "ev->sf.get();")
trio_replace(rpc 1 [=[
        if (auto dispatcher = it->second.lock()) {
            return dispatcher;
]=] [=[
        if (auto dispatcher = it->second.lock()) {
            if (!dispatcher->is_gone()) return dispatcher; // or it may be back
]=])

# Contexts wait for their backends in their destructors, and events and buffers are freed there.
trio_replace(rpc 1 [=[
};

struct ggml_backend_rpc_buffer_context {
]=] [=[
    bool told = false; // that the server is gone
};

struct ggml_backend_rpc_buffer_context {
]=])
trio_replace(rpc 1 [=[
    rpc_ctx->dispatcher->synchronize();
]=] [=[
    if (rpc_ctx->told) return;
    try {
        rpc_ctx->dispatcher->synchronize();
    } catch (...) {
        rpc_ctx->told = true;
        throw;
    }
]=])
foreach(function event_free event_synchronize)
  trio_replace(rpc 1 "    void ${function}(" "    static void ${function}(")
  trio_replace(rpc 1 "    ggml_backend_rpc_device_context * ctx = (ggml_backend_rpc_device_context *)dev->context;
    auto dispatcher = get_dispatcher(ctx->endpoint);
    dispatcher->${function}(event);" "    rpc_dispatcher::${function}(event);
    GGML_UNUSED(dev);")
endforeach()
trio_replace(rpc 1 [=[
    ctx->dispatcher->send(RPC_CMD_FREE_BUFFER, request, sizeof(*request));
]=] [=[
    try {
        if (!ctx->dispatcher->is_gone()) {
            std::lock_guard<std::mutex> lock(ctx->dispatcher->graphs_mutex);
            ctx->dispatcher->graphs.clear();
            ctx->dispatcher->send(RPC_CMD_FREE_BUFFER, request, sizeof(*request));
        }
    } catch (...) {
    }
]=])

# This thread may wait for a server that hangs, and would not notice that its socket is closed.
trio_replace(rpc 1 [=[
    sock = nullptr;
    if (thread.joinable()) {
]=] [=[
    if (sock != nullptr) {
        sock->hang_up();
    }
    if (thread.joinable()) {
]=])

# Somebody else may answer, or an rpc-server of another version.
trio_replace(rpc 1 "    if (!negotiate_hello(sock)) {" "    if (sock == nullptr) { // or it was greeted")
trio_replace(rpc 1 [=[
    sock = socket_t::connect(host.c_str(), port);
]=] [=[
    this->endpoint = endpoint;
    try {
        sock = socket_t::connect(host.c_str(), port);
        negotiate_hello(sock);
    } catch (const std::exception & error) {
        throw std::runtime_error("the rpc-server " + endpoint + " " + error.what());
    }
    sock->set_timeout(rpc_seconds());
]=])
trio_replace(rpc 1 "    RPC_STATUS_ASSERT(status);" "    if (!status) {
        throw std::runtime_error(\"does not answer as one: is it one, of this version, and has it no other client?\");
    }")
trio_replace(rpc 1 [=[
        GGML_LOG_ERROR("RPC server version mismatch: %d.%d.%d\n",
                       response.major, response.minor, response.patch);
]=] [=[
        const auto version = [](int major, int minor) { return std::to_string(major) + "." + std::to_string(minor); };
        throw std::runtime_error("speaks version " + version(response.major, response.minor) + " of the protocol, not " +
                                 version(RPC_PROTO_MAJOR_VERSION, RPC_PROTO_MINOR_VERSION));
]=])
trio_replace(rpc 1 [=[
    if (dev_count == 0) {
        return nullptr;
    }
]=] [=[
    if (dev_count == 0 || dev_count > 64) {
        throw std::runtime_error("the rpc-server " + std::string(endpoint) + " has " + std::to_string(dev_count) + " devices");
    }
]=])
trio_replace(rpc 1 "    size_t alignment = get_alignment(dispatcher, device);" "    size_t alignment = get_alignment(dispatcher, device);
    if (alignment == 0 || (alignment & (alignment - 1)) != 0) {
        throw std::runtime_error(\"the rpc-server \" + std::string(endpoint) + \" aligns to \" + std::to_string(alignment));
    }")
trio_replace(rpc 1 "    if (response.remote_ptr != 0) {" "    if (response.remote_ptr != 0 && response.remote_size >= size) {")

# A server keeps the last graph of each device until any buffer is freed, and hangs up on whoever means one that it does
# not have. Contexts compute and are freed at the same time, and so does a trial of an adapter.
trio_replace(rpc 1 [=[
    bool reuse = cgraph->uid != 0 && rpc_dev_ctx->last_graph_uid == cgraph->uid;
]=] [=[
    std::lock_guard<std::mutex> lock(rpc_ctx->dispatcher->graphs_mutex);
    uint64_t & last_graph_uid = rpc_ctx->dispatcher->graphs[rpc_ctx->device];
    bool reuse = cgraph->uid != 0 && last_graph_uid == cgraph->uid;
    GGML_UNUSED(rpc_dev_ctx);
]=])
trio_replace(rpc 1 "        rpc_dev_ctx->last_graph_uid = cgraph->uid;" "        last_graph_uid = cgraph->uid;")

file(READ ${directory}/transport.h header)
trio_replace(header 1 [=[
    void get_caps(uint8_t * local_caps);
]=] [=[
    void set_timeout(int seconds); // for each call below it
    void hang_up(); // whoever waits for it notices
    void get_caps(uint8_t * local_caps);
]=])
trio_replace(header 1 [=[
bool rpc_transport_init();
]=] [=[
bool rpc_transport_init();
int rpc_seconds(); // that a server may take to answer
]=])

file(READ ${directory}/transport.cpp transport)
trio_replace(transport 1 [=[
#include <cstdlib>
]=] [=[
#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <stdexcept>
#include <string>
]=])
trio_replace(transport 1 [=[
static bool set_reuse_addr(]=] [=[
int rpc_seconds() {
    static const int seconds = [] {
        const char * text = std::getenv("TRIO_RUNNER_RPC_SECONDS");
        const int n = text ? std::atoi(text) : 0;
        return n > 0 ? n : 300;
    }();
    return seconds;
}

void socket_t::set_timeout(int seconds) {
#ifndef _WIN32
    timeval time = {};
    time.tv_sec = seconds;
    (void) setsockopt(pimpl->fd, SOL_SOCKET, SO_RCVTIMEO, &time, sizeof(time));
    (void) setsockopt(pimpl->fd, SOL_SOCKET, SO_SNDTIMEO, &time, sizeof(time));
#endif
}

void socket_t::hang_up() {
#ifdef _WIN32
    (void) shutdown(pimpl->fd, SD_BOTH);
#else
    (void) shutdown(pimpl->fd, SHUT_RDWR);
#endif
}

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
trio_replace(transport 1 "    if (!set_no_delay(sockfd)) {" "    socket_ptr client(new socket_t(std::make_unique<impl>(sockfd))); // closes it, whatever happens
    set_keep_alive(sockfd);
    client->set_timeout(std::min(rpc_seconds(), 10));
    if (!set_no_delay(sockfd)) {")
trio_replace(transport 1 [=[
        GGML_LOG_ERROR("Cannot resolve host '%s'\n", host);
        return nullptr;
]=] [=[
        throw std::runtime_error("cannot be found: nobody knows this name");
]=])
trio_replace(transport 1 [=[
    if (::connect(sockfd, (struct sockaddr *)&addr, sizeof(addr)) < 0) {
        return nullptr;
    }
    return socket_ptr(new socket_t(std::make_unique<impl>(sockfd)));
]=] [=[
    if (::connect(sockfd, (struct sockaddr *)&addr, sizeof(addr)) < 0) {
        throw std::runtime_error(std::string("cannot be reached: ") + std::strerror(errno == EINPROGRESS ? ETIMEDOUT : errno));
    }
    return client;
]=])
# Sockets with a timeout are interrupted by every signal, and when the process is continued. And a client that has waited
# for its turn in vain is no reason for a server to end.
trio_replace(transport 1 "        ssize_t n = send(fd, (const char *)data + bytes_sent, size_to_send, 0);" "#ifdef MSG_NOSIGNAL
        ssize_t n = send(fd, (const char *)data + bytes_sent, size_to_send, MSG_NOSIGNAL);
#else
        ssize_t n = send(fd, (const char *)data + bytes_sent, size_to_send, 0);
#endif
        if (n < 0 && errno == EINTR) continue;")
trio_replace(transport 1 "        ssize_t n = recv(fd, (char *)data + bytes_recv, size_to_recv, 0);" "        ssize_t n = recv(fd, (char *)data + bytes_recv, size_to_recv, 0);
        if (n < 0 && errno == EINTR) continue;")

set(patched ${CMAKE_BINARY_DIR}/rpc)
function(trio_write name content)
  set(old "")
  if(EXISTS ${patched}/${name})
    file(READ ${patched}/${name} old)
  endif()
  if(NOT old STREQUAL content) # or Ninja would compile it again
    file(WRITE ${patched}/${name} "${content}")
  endif()
endfunction()
trio_write(rpc.cpp "${rpc}")
trio_write(transport.cpp "${transport}")
trio_write(transport.h "${header}")
set_property(TARGET ggml-rpc PROPERTY SOURCES ${patched}/rpc.cpp ${patched}/transport.cpp)
target_include_directories(ggml-rpc PRIVATE ${directory})
target_compile_options(ggml-rpc PRIVATE -ffile-prefix-map=${patched}=ggml-rpc)
