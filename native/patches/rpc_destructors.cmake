# Nothing is thrown twice, or out of a destructor, and no destructor waits without end.
#
# Why: a context waits for its backends in its destructor, and frees events and buffers there. So a backend throws once
# that its server is lost, and is silent from then on; freeing fails silently. Freeing an event needs no connection, so
# it must not open one. And the dispatcher's thread may be waiting for a server that hangs: closing the socket object
# would not wake it up, shutting down the connection does.
# Until: rpc_lost_server.cmake goes, or upstream's destructors ask nothing of a server.

trio_replace(rpc 1 [=[
};

struct ggml_backend_rpc_buffer_context {
]=] [=[
    bool told = false; // synchronize() has thrown that the server is lost
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
            ctx->dispatcher->send(RPC_CMD_FREE_BUFFER, request, sizeof(*request));
        }
    } catch (...) {
    }
]=])

trio_replace(rpc 1 [=[
    sock = nullptr;
    if (thread.joinable()) {
]=] [=[
    if (sock != nullptr) {
        sock->hang_up();
    }
    if (thread.joinable()) {
]=])
