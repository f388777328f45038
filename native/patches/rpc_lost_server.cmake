# A server that is lost becomes an exception in the calls that need it.
#
# Why: upstream ends the process when a command fails. It does so on the dispatcher's own thread, where no guard of
# ours can be, while other threads wait for that thread for ever. Here the dispatcher's thread keeps the reason and
# gives it to everyone who waits or comes later; they throw it.
# Until: upstream throws, or returns a status, instead of aborting.

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
    std::exception_ptr failure; // set before `gone`, and before the queue refuses more
    std::atomic_bool gone{false};
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
                    sock->hang_up(); // the server may live, and have other clients waiting
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
            if (!dispatcher->is_gone()) return dispatcher; // otherwise connect again: it may be back
]=])
