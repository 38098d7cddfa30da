//! Listening sockets: one for each core and address, sharing the port by SO_REUSEPORT.

use std::{
    io,
    net::{SocketAddr, TcpListener},
};

use socket2::{Domain, Protocol, Socket, Type};

/// Longest queue of connections that wait to be accepted; the system caps it at `somaxconn`.
const BACKLOG: i32 = 4096;

/// A listening address that cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// Somebody else listens there.
    #[error(
        "{address} is in use by another process; stop it, or choose another address (--listen; --port for `dev`)"
    )]
    InUse {
        /// The address asked for.
        address: SocketAddr,
    },
    /// Anything else the system says.
    #[error("cannot listen on {address}: {source}")]
    Io {
        /// The address asked for.
        address: SocketAddr,
        /// What the system said.
        source: io::Error,
    },
}

/// One socket for each core on `address`; port 0 takes a free port, the same for all.
///
/// # Errors
///
/// The address is in use or not ours to take.
pub fn bind(address: SocketAddr, cores: usize) -> Result<Vec<TcpListener>, ListenError> {
    let fail = |source: io::Error| match source.kind() {
        io::ErrorKind::AddrInUse => ListenError::InUse { address },
        _ => ListenError::Io { address, source },
    };
    // Bound first without SO_REUSEPORT: with it, a second gateway of the same user would silently
    // share our connections instead of being told that the port is taken.
    if address.port() != 0 {
        drop(open(address, false).map_err(fail)?);
    }
    let first = open(address, true).map_err(fail)?;
    let address = first.local_addr().map_err(fail)?;
    let mut sockets = vec![first];
    while sockets.len() < cores {
        sockets.push(open(address, true).map_err(fail)?);
    }
    Ok(sockets)
}

fn open(address: SocketAddr, share_port: bool) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    if address.is_ipv6() {
        // An IPv4 listener on the same port is its own socket.
        socket.set_only_v6(true)?;
    }
    if share_port {
        socket.set_reuse_port(true)?;
    }
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    const ANY: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 0);

    #[test]
    fn all_cores_share_one_port() {
        let sockets = bind(ANY, 3).unwrap();
        let ports: Vec<_> = sockets.iter().map(|socket| socket.local_addr().unwrap().port()).collect();
        assert_eq!(ports.len(), 3);
        assert!(ports.iter().all(|port| *port == ports[0] && *port != 0));
    }

    #[test]
    fn a_port_in_use_is_said_so_even_if_it_could_be_shared() {
        let sockets = bind(ANY, 1).unwrap();
        let taken = sockets[0].local_addr().unwrap();
        let error = bind(taken, 1).unwrap_err();
        assert!(error.to_string().contains("is in use"), "{error}");
    }
}
