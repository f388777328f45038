# What a server says of itself is checked, and the reason is given if it cannot be used.
#
# Why: something else may listen at that address, or an rpc-server of another version. Upstream aborts on some answers
# and trusts others, such as the number of devices, the alignment and the size of a buffer.
# Until: upstream checks them, and says what is wrong.

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
        throw std::runtime_error(\"gave no valid answer: is it an rpc-server of this version, and without another client?\");
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
