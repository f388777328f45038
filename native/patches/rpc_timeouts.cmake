# No call waits without end for a server.
#
# Why: upstream waits for ever. Here a server whose machine has vanished is noticed within half a minute (keep-alive),
# one that hangs after TRIO_RUNNER_RPC_SECONDS (300), and one that does not begin to answer after ten seconds. A socket
# with a timeout is interrupted by every signal, and when a stopped process continues: such calls are repeated. A
# server sends without SIGPIPE: a client that gave up while it waited for its turn must not end it.
# Until: upstream has timeouts.

trio_replace(header 1 [=[
    void get_caps(uint8_t * local_caps);
]=] [=[
    void set_timeout(int seconds); // of each send and receive
    void hang_up(); // wakes up a thread that sends or receives
    void get_caps(uint8_t * local_caps);
]=])
trio_replace(header 1 [=[
bool rpc_transport_init();
]=] [=[
bool rpc_transport_init();
int rpc_seconds(); // the most that a server may take to answer
]=])

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
        throw std::runtime_error("cannot be found: its host name is unknown");
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
trio_replace(transport 1 "        ssize_t n = send(fd, (const char *)data + bytes_sent, size_to_send, 0);" "#ifdef MSG_NOSIGNAL
        ssize_t n = send(fd, (const char *)data + bytes_sent, size_to_send, MSG_NOSIGNAL);
#else
        ssize_t n = send(fd, (const char *)data + bytes_sent, size_to_send, 0);
#endif
        if (n < 0 && errno == EINTR) continue;")
trio_replace(transport 1 "        ssize_t n = recv(fd, (char *)data + bytes_recv, size_to_recv, 0);" "        ssize_t n = recv(fd, (char *)data + bytes_recv, size_to_recv, 0);
        if (n < 0 && errno == EINTR) continue;")
