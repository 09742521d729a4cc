package rabbitmq

import (
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"math"
	"net"
	"net/url"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
)

// defaultNamespace is the exchange's name if the URL names none, and the one whose queues have plain names.
const defaultNamespace = "takeout"

// address is where the broker is, and what of it is ours.
type address struct {
	url       string // for amqp091: without our own parameters, with the password, and without TLS, which is ours
	uri       amqp.URI
	namespace string
}

// String names the broker for people. It leaves out the user, the password and every parameter.
func (a address) String() string {
	return fmt.Sprintf("%s://%s:%d/%s", a.uri.Scheme, a.uri.Host, a.uri.Port, strings.TrimPrefix(a.uri.Vhost, "/"))
}

// errNotURL stands for all that net/url and amqp091 say about a URL they cannot read: both repeat it, and a part
// of the password with it if that has unescaped characters.
var errNotURL = errors.New("broker URL: not amqp://user:password@host:port/vhost; " +
	"characters like / ? # @ : in the user name or password must be percent-encoded")

var (
	namespaceForm = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$`)
	parameterForm = regexp.MustCompile(`^[a-z_]{1,40}$`)
)

// knownParameters is what amqp091 reads. It ignores all others, so that a misspelt one would have no effect.
var knownParameters = []string{"certfile", "keyfile", "cacertfile", "server_name_indication", "auth_mechanism",
	"heartbeat", "connection_timeout", "channel_max"}

// secure returns conn with TLS on it if the URL says amqps, and with the deadline, which amqp091 takes away when it has agreed
// with the broker. It reads the files that the URL names each time.
func (a address) secure(ctx context.Context, conn net.Conn, deadline time.Time) (net.Conn, error) {
	if err := conn.SetDeadline(deadline); err != nil || a.uri.Scheme != "amqps" {
		return conn, err
	}
	cfg := &tls.Config{ServerName: cmp.Or(a.uri.ServerName, a.uri.Host), MinVersion: tls.VersionTLS12}
	if file := a.uri.CACertFile; file != "" {
		pem, err := os.ReadFile(file)
		if err != nil {
			return nil, fmt.Errorf("broker URL: cacertfile: %w", err)
		}
		cfg.RootCAs = x509.NewCertPool()
		if !cfg.RootCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("broker URL: cacertfile: %s has no certificate in PEM form", file)
		}
	}
	if a.uri.CertFile != "" {
		own, err := tls.LoadX509KeyPair(a.uri.CertFile, a.uri.KeyFile)
		if err != nil {
			return nil, fmt.Errorf("broker URL: certfile and keyfile: %w", err)
		}
		cfg.Certificates = []tls.Certificate{own}
	}
	client := tls.Client(conn, cfg)
	return client, client.HandshakeContext(ctx)
}

// CheckURL returns what is wrong with a broker's URL, nil if nothing is. It does not connect, and repeats no password.
func CheckURL(rawURL string) error {
	_, err := parseAddress(rawURL)
	return err
}

func parseAddress(rawURL string) (address, error) {
	u, err := url.Parse(rawURL)
	if err != nil {
		return address{}, errNotURL
	}
	if u.Scheme != "amqp" && u.Scheme != "amqps" {
		return address{}, errors.New("broker URL: the scheme must be amqp or amqps")
	}
	// An @ behind the host is the end of a password that had an unescaped character before it.
	behindHost := u.Opaque + u.EscapedPath() + u.RawQuery
	if u.Opaque != "" || u.Fragment != "" || strings.ContainsAny(behindHost, "@ ") || u.Hostname() == "" {
		return address{}, errNotURL
	}
	query, err := url.ParseQuery(u.RawQuery)
	if err != nil {
		return address{}, errNotURL
	}

	namespace := defaultNamespace
	if query.Has("namespace") {
		namespace = query.Get("namespace")
		query.Del("namespace")
	}
	if !namespaceForm.MatchString(namespace) || strings.HasPrefix(namespace, "amq.") {
		return address{}, errors.New("broker URL: namespace must be 1 to 64 letters, digits, dots, dashes and " +
			"underscores, and must not begin with the reserved amq")
	}
	for name := range query {
		if !parameterForm.MatchString(name) {
			return address{}, errNotURL
		}
		if !slices.Contains(knownParameters, name) {
			return address{}, fmt.Errorf("broker URL: unknown parameter %s; known are namespace, %s",
				name, strings.Join(knownParameters, ", "))
		}
	}
	for name, bits := range map[string]int{"heartbeat": 16, "connection_timeout": 31, "channel_max": 16} {
		if _, err := strconv.ParseUint(query.Get(name), 10, bits); query.Has(name) && err != nil {
			return address{}, fmt.Errorf("broker URL: %s must be a whole number", name)
		}
	}
	for _, mechanism := range query["auth_mechanism"] {
		if !slices.Contains([]string{"PLAIN", "AMQPLAIN", "EXTERNAL"}, strings.ToUpper(mechanism)) {
			return address{}, errors.New("broker URL: auth_mechanism must be plain, amqplain or external")
		}
	}

	if (query.Get("certfile") == "") != (query.Get("keyfile") == "") {
		return address{}, errors.New("broker URL: certfile and keyfile belong together")
	}

	u.RawQuery = query.Encode()
	uri, err := amqp.ParseURI(u.String())
	if err != nil {
		return address{}, errNotURL
	}
	if uri.Port > math.MaxUint16 {
		return address{}, errors.New("broker URL: the port must be from 1 to 65535")
	}
	u.Scheme, u.Host = "amqp", net.JoinHostPort(uri.Host, strconv.Itoa(uri.Port))
	return address{u.String(), uri, namespace}, nil
}
