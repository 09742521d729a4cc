package main

import (
	"bytes"
	"cmp"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/alecthomas/kong"
	"github.com/stretchr/testify/require"
)

// password is in every secret here, and must not come out anywhere.
const password = "hunter2"

// refuses checks that the program ends with the exit code and one line that says what is wrong.
func refuses(t *testing.T, code int, about string, args ...string) {
	t.Helper()
	var stdout, stderr bytes.Buffer
	got := run(args, &stdout, &stderr)
	shown := strings.Join(args, " ") + "\n" + stdout.String() + stderr.String()
	require.Equal(t, code, got, shown)
	require.Empty(t, stdout.String(), shown)
	require.True(t, strings.HasPrefix(stderr.String(), "takeout: "), shown)
	require.Equal(t, 1, strings.Count(stderr.String(), "\n"), "one line: %s", shown)
	require.Contains(t, stderr.String(), about, shown)
	require.NotContains(t, stderr.String(), "goroutine", shown)
	require.NotContains(t, stderr.String(), password, shown)
}

// commands are all commands that do something.
func commands(t *testing.T) []*kong.Node {
	t.Helper()
	parser, err := kong.New(&cli{})
	require.NoError(t, err)
	return parser.Model.Leaves(false)
}

// words are what names the command on the command line.
func words(command *kong.Node) []string {
	var all []string
	for n := command; n.Parent != nil; n = n.Parent {
		all = append([]string{n.Name}, all...)
	}
	return all
}

// rightArgs are arguments and flags with which the command may run.
func rightArgs(command *kong.Node) []string {
	args := words(command)
	for _, positional := range command.Positional {
		value := map[string]string{"amount": "100", "id": "dispatch-1"}[positional.Name]
		args = append(args, cmp.Or(value, "x"))
	}
	for _, flag := range command.Flags {
		if flag.Required {
			args = append(args, "--"+flag.Name+"=x")
		}
	}
	if command.Name == "edit" {
		args = append(args, "--payload-file="+os.DevNull)
	}
	return slices.Clip(args)
}

func kongFlags(command *kong.Node) []*kong.Flag {
	var flags []*kong.Flag
	for _, group := range command.AllFlags(false) {
		flags = append(flags, group...)
	}
	return slices.DeleteFunc(flags, func(f *kong.Flag) bool { return f.Name == "help" })
}

// Every command is run with everything wrong that fits it, so that a new one is, too.
func TestEveryCommandRefusesWhatItDoesNotKnow(t *testing.T) {
	t.Chdir(t.TempDir())
	n := 0
	wrong := func(about string, args ...string) {
		t.Helper()
		refuses(t, exitUsage, about, args...)
		n++
	}
	for _, command := range commands(t) {
		right := rightArgs(command)
		wrong("--nothing", append(right, "--nothing")...)
		wrong("--nothing", append(right, "--nothing=1")...)
		wrong("-z", append(right, "-z")...)
		if len(command.Positional) == 0 || !command.Positional[len(command.Positional)-1].IsSlice() {
			wrong("unexpected argument", append(right, "more")...)
		}
		if slices.ContainsFunc(command.Positional, func(p *kong.Value) bool { return p.Required }) {
			wrong("", words(command)...)
		}
		for _, flag := range kongFlags(command) {
			name := "--" + flag.Name
			if !flag.IsBool() && flag.Target.Kind().String() != "ptr" {
				wrong(name, append(right, name)...)
			}
			kind := flag.Target.Type().String()
			switch {
			case flag.Enum != "":
				wrong(name, append(right, name+"=nothing")...)
				wrong(name, append(right, name+"=")...)
			case strings.HasSuffix(kind, "string"): // the program or the server looks at it
			default: // numbers, durations, times, booleans
				for _, value := range []string{"many", "1.5.1", "\x00", "99999999999999999999h", "é"} {
					wrong(name, append(right, name+"="+value)...)
				}
			}
		}
	}
	wrong("frobnicate", "frobnicate")
	wrong("expected one of", "order")
	wrong("eat", "order", "eat")
	wrong("to must be later", "reconcile", "--from=2026-01-02T00:00:00Z", "--to=2026-01-01T00:00:00Z")
	wrong("from", "reconcile", "--from=2199-01-01T00:00:00Z")
	wrong("full", "reconcile", "--full", "--from=2026-01-01T00:00:00Z")
	require.Greater(t, n, 500)
}

func TestEveryCommandThatAsksAServerSaysWhenNobodyAnswers(t *testing.T) {
	t.Chdir(t.TempDir())
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	nobody := "http://user:" + password + "@" + listener.Addr().String()
	require.NoError(t, listener.Close())
	asking := 0
	for _, command := range commands(t) {
		if !slices.ContainsFunc(kongFlags(command), func(f *kong.Flag) bool { return f.Name == "url" }) {
			continue
		}
		asking++
		args := rightArgs(command)
		refuses(t, exitUsage, "--url (TAKEOUT_URL)", append(args, "--url=127.0.0.1:8080")...)
		refuses(t, exitUsage, "--url (TAKEOUT_URL)", append(args, "--url=ftp://127.0.0.1")...)
		refuses(t, exitUsage, "--url (TAKEOUT_URL)", append(args, "--url=")...)
		refuses(t, exitUsage, "--url", append(args, "--url="+nobody)...)
		if slices.Contains([]string{"place", "watch"}, command.Name) {
			continue // they try again
		}
		t.Setenv("TAKEOUT_URL", nobody)
		refuses(t, exitFailed, "no takeout answers", args...)
		t.Setenv("TAKEOUT_URL", "")
	}
	require.Greater(t, asking, 15)
}

func TestSecretFileThatEverybodyMayReadIsPointedOut(t *testing.T) {
	t.Chdir(t.TempDir())
	file := filepath.Join(t.TempDir(), "broker")
	require.NoError(t, os.WriteFile(file, []byte("amqp://user:"+password+"@127.0.0.1:1/\n"), 0o600))
	for mode, warned := range map[os.FileMode]bool{0o600: false, 0o640: false, 0o644: true, 0o604: true} {
		require.NoError(t, os.Chmod(file, mode))
		t.Setenv("TAKEOUT_BROKER_URL", "")
		t.Setenv("TAKEOUT_BROKER_URL_FILE", file)
		var stdout, stderr bytes.Buffer
		require.Zero(t, run([]string{"config"}, &stdout, &stderr), stderr.String())
		if warned {
			require.Contains(t, stderr.String(), "TAKEOUT_BROKER_URL_FILE: every user of this machine can read the file "+file)
		} else {
			require.Empty(t, stderr.String())
		}
		require.NotContains(t, stdout.String()+stderr.String(), password)
	}
}
