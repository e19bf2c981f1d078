package main

import (
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"syscall"
	"testing"

	"sniproxy/hostdir/hostdirtest"
)

// postgresClient makes a query over TLS from the first byte, as since PostgreSQL 17. Debian 12 has
// the client of PostgreSQL 15, which cannot do that.
const postgresClient = `package main

import (
	"database/sql"
	"fmt"
	"log"
	"os"

	_ "github.com/lib/pq"
)

func main() {
	db, err := sql.Open("postgres", os.Args[1])
	if err != nil {
		log.Fatal(err)
	}
	var sum int
	if err := db.QueryRow("SELECT sum(n * $1) FROM generate_series(1, 1000) n", 2).Scan(&sum); err != nil {
		log.Fatal(err)
	}
	fmt.Print(sum)
}
`

// postgresModule is the module of the client. .ci/run fetches it.
const postgresModule = "github.com/lib/pq@v1.12.3"

// unprivileged makes a program run as nobody where it would run as root, which PostgreSQL refuses.
func unprivileged(t testing.TB, cmd *exec.Cmd) *exec.Cmd {
	t.Helper()
	if os.Geteuid() == 0 {
		nobody, err := user.Lookup("nobody")
		hostdirtest.Must(t, err)
		uid, _ := strconv.Atoi(nobody.Uid)
		gid, _ := strconv.Atoi(nobody.Gid)
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}}
	}
	return cmd
}

// Goal: a client of PostgreSQL with direct TLS, which insists on its protocol (ALPN), reaches a
// server that knows no TLS.
func TestPostgres(t *testing.T) {
	t.Parallel()
	found, _ := filepath.Glob("/usr/lib/postgresql/*/bin/initdb")
	if len(found) == 0 {
		hostdirtest.Missing(t, "postgresql")
	}
	goTool, bin := hostdirtest.Need(t, "go"), filepath.Dir(found[0])
	client := t.TempDir()
	put(t, filepath.Join(client, "go.mod"), []byte("module client\n\ngo 1.26\n"))
	put(t, filepath.Join(client, "main.go"), []byte(postgresClient))
	for _, args := range [][]string{{"get", postgresModule}, {"build", "-o", "client", "."}} {
		cmd := exec.Command(goTool, args...)
		cmd.Dir = client
		cmd.Env = append(os.Environ(), "GOWORK=off", "GOFLAGS=", "CGO_ENABLED=0")
		if out, err := cmd.CombinedOutput(); err != nil && args[0] == "get" {
			t.Logf("%v: %s", err, out)
			hostdirtest.Missing(t, postgresModule)
		} else if err != nil {
			t.Fatalf("%v: %s", err, out)
		}
	}

	dir, addr := hostdirtest.Dir(t), freeAddr(t)
	hostdirtest.Must(t, os.Chmod(dir, 0o777))
	data := filepath.Join(dir, "data")
	initdb := unprivileged(t, exec.Command(filepath.Join(bin, "initdb"), "--no-sync", "--auth=trust", "--username=alice", "--pgdata="+data))
	initdb.Dir = dir
	output(t, initdb)
	server := unprivileged(t, exec.Command(filepath.Join(bin, "postgres"), "-D", data, "-p", portOf(addr), "-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories=", "-F"))
	server.Dir = dir
	p := launch(t, server)
	p.lines.Await(t, "database system is ready")

	s := newSite(t)
	s.install(t, "db.example", "db.example")
	s.serve(t, "db.example", "tcp://"+addr)
	// The certificate is for the host, which is found by its address.
	where := "host=db.example hostaddr=127.0.0.1 port=" + portOf(s.addr) + " user=alice dbname=postgres sslmode=verify-full sslnegotiation=direct sslrootcert=" + s.caPEM
	if got := output(t, exec.Command(filepath.Join(client, "client"), where)); got != "1001000" {
		t.Errorf("%q", got)
	}
}
