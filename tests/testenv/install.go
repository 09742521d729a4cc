package testenv

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/gofrs/flock"

	"takeout/verify/servers"
)

// installPackage installs the server of this kind on Debian and Ubuntu, if we are root there.
func installPackage(k servers.Kind) error {
	release, err := os.ReadFile("/etc/os-release")
	if err != nil || !isDebian(string(release)) {
		return errors.New("this is not Debian or Ubuntu, so the tests cannot install it")
	}
	pkg := "mariadb-server"
	if k == servers.RabbitMQ {
		pkg = "rabbitmq-server"
	}
	if os.Geteuid() != 0 {
		return fmt.Errorf("not root, so the tests cannot run apt-get install %s", pkg)
	}
	// Test processes of several packages may come here at once.
	lock := flock.New(filepath.Join(os.TempDir(), "takeout-test-install.lock"))
	if err := lock.Lock(); err != nil {
		return err
	}
	defer lock.Unlock()
	if _, err := findNative(k); err == nil {
		return nil
	}
	say("installing %s with apt-get", pkg)
	began := time.Now()
	defer endStrayDaemons(daemons())
	restore, err := forbidServices()
	if err != nil {
		return err
	}
	defer restore()
	install := []string{"install", "-y", "--no-install-recommends", pkg}
	// Without package lists, or with old ones, it fails at once.
	if err := apt(install...); err != nil {
		if err := apt("update"); err != nil {
			return err
		}
		if err := apt(install...); err != nil {
			return err
		}
	}
	say("installed %s in %.0f s", pkg, time.Since(began).Seconds())
	return nil
}

func isDebian(release string) bool {
	for line := range strings.Lines(release) {
		key, value, _ := strings.Cut(strings.TrimSpace(line), "=")
		if key != "ID" && key != "ID_LIKE" {
			continue
		}
		for id := range strings.FieldsSeq(strings.Trim(value, `"`)) {
			if id == "debian" || id == "ubuntu" {
				return true
			}
		}
	}
	return false
}

func apt(args ...string) error {
	cmd := exec.Command("apt-get", append([]string{"-q", "-o", "DPkg::Lock::Timeout=300"}, args...)...)
	cmd.Env = append(os.Environ(), "DEBIAN_FRONTEND=noninteractive")
	out, err := cmd.CombinedOutput()
	if err != nil {
		lines := bytes.Split(bytes.TrimSpace(out), []byte("\n"))
		return fmt.Errorf("apt-get %s: %w\n%s", strings.Join(args, " "), err, bytes.Join(lines[max(0, len(lines)-10):], []byte("\n")))
	}
	return nil
}

// forbidServices keeps packages from starting their services while they are installed, with Debian's
// means for that: policy-rc.d. A policy that exists already is the machine owner's and stays.
func forbidServices() (restore func(), err error) {
	const policy = "/usr/sbin/policy-rc.d"
	f, err := os.OpenFile(policy, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o755)
	if errors.Is(err, os.ErrExist) {
		return func() {}, nil
	}
	if err != nil {
		return nil, err
	}
	_, err = f.WriteString("#!/bin/sh\nexit 101\n")
	return func() { _ = os.Remove(policy) }, errors.Join(err, f.Close())
}

// daemons lists the Erlang name servers of this machine.
func daemons() map[int]bool {
	found := map[int]bool{}
	names, _ := filepath.Glob("/proc/[0-9]*/comm")
	for _, file := range names {
		if name, err := os.ReadFile(file); err == nil && strings.TrimSpace(string(name)) == "epmd" {
			if pid, err := strconv.Atoi(filepath.Base(filepath.Dir(file))); err == nil {
				found[pid] = true
			}
		}
	}
	return found
}

// endStrayDaemons ends the name server that RabbitMQ's package starts as user rabbitmq when it is
// installed, even where services may not start.
func endStrayDaemons(before map[int]bool) {
	for pid := range daemons() {
		owner, err := os.Stat("/proc/" + strconv.Itoa(pid))
		if err == nil && !before[pid] && owner.Sys().(*syscall.Stat_t).Uid != 0 {
			_ = syscall.Kill(pid, syscall.SIGTERM)
		}
	}
}
