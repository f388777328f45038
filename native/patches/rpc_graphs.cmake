# The client knows which graph the server keeps for each device.
#
# Why: a server keeps the last graph of each device until any buffer is freed. It hangs up on a client that asks it to
# compute a graph again which it does not have. Upstream remembers the graph for each backend; but several contexts
# share a server: one may compute while another one, or the trial of an adapter, frees its buffers.
# Until: upstream remembers graphs where it sends them, or a server asks for a graph that it lacks.

trio_replace(rpc 1 [=[
    void start(const std::string & endpoint);
]=] [=[
    std::mutex graphs_mutex;                       // held until the command about them is sent
    std::unordered_map<uint32_t, uint64_t> graphs; // that the server has, by device
    void start(const std::string & endpoint);
]=])
trio_replace(rpc 1 [=[
            ctx->dispatcher->send(RPC_CMD_FREE_BUFFER, request, sizeof(*request));
]=] [=[
            std::lock_guard<std::mutex> lock(ctx->dispatcher->graphs_mutex);
            ctx->dispatcher->graphs.clear();
            ctx->dispatcher->send(RPC_CMD_FREE_BUFFER, request, sizeof(*request));
]=])
trio_replace(rpc 1 [=[
    bool reuse = cgraph->uid != 0 && rpc_dev_ctx->last_graph_uid == cgraph->uid;
]=] [=[
    std::lock_guard<std::mutex> lock(rpc_ctx->dispatcher->graphs_mutex);
    uint64_t & last_graph_uid = rpc_ctx->dispatcher->graphs[rpc_ctx->device];
    bool reuse = cgraph->uid != 0 && last_graph_uid == cgraph->uid;
    GGML_UNUSED(rpc_dev_ctx);
]=])
trio_replace(rpc 1 "        rpc_dev_ctx->last_graph_uid = cgraph->uid;" "        last_graph_uid = cgraph->uid;")
