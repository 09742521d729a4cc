//go:build linux

package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/alecthomas/kong"

	"takeout/app"
	"takeout/domain"
	"takeout/domain/order"
	"takeout/service"
)

// What every order is, for every system.
const (
	dish     = "麻婆豆腐"
	amount   = 2850
	currency = "CNY"
)

// config returns the product's settings for the site: the defaults, but where it says so.
func (s site) config() (service.Config, error) {
	var cfg service.Config
	parser, err := kong.New(&cfg)
	if err != nil {
		return cfg, err
	}
	_, err = parser.Parse(slices.Concat(s.Settings, []string{
		"--http-addr=127.0.0.1:0", "--data-dir=" + s.Dir, "--broker-url=" + s.Broker, "--order-database-url=" + s.Order,
		"--dispatch-database-url=" + s.Dispatch, "--payment-database-url=" + s.Payment, "--points-database-url=" + s.Points,
	}))
	return cfg, err
}

// product is takeout itself.
type product struct{ *service.Service }

func startProduct(ctx context.Context, s site) (system, error) {
	cfg, err := s.config()
	if err != nil {
		return nil, err
	}
	running, err := service.Start(ctx, cfg, slog.New(slog.NewJSONHandler(os.Stderr, nil)))
	if err != nil {
		return nil, err
	}
	return product{running}, nil
}

func (p product) addr() string { return p.Addr() }

func (p product) close() error { return p.Stop(context.Background()) }

// place calls the use case as the HTTP port does.
func (p product) place(ctx context.Context, number int) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	return placeOrder(ctx, p.Orders(), number)
}

func placeOrder(ctx context.Context, orders *app.Orders, number int) error {
	id, err := order.ParseID(orderID(number))
	if err != nil {
		return err
	}
	money, err := domain.NewMoney(amount, currency)
	if err != nil {
		return err
	}
	_, err = orders.Place(ctx, app.PlaceOrder{ID: id, Name: dish, Money: money})
	return err
}

// client places orders through HTTP. It reads and writes on connections of its own, because net/http's client costs as
// much as the server that is to be measured.
type client struct {
	addr string
	mu   sync.Mutex
	idle []*connection
}

type connection struct {
	net.Conn
	reader *bufio.Reader
	used   time.Time
}

// longestIdle is less than what the server allows: a connection that it closes at this moment would fail an order.
const longestIdle = 20 * time.Second

// place places an order, on a connection that nobody uses or a new one.
func (c *client) place(_ context.Context, number int) error {
	conn, err := c.take()
	if err != nil {
		return err
	}
	body := fmt.Sprintf(`{"order_id":"%s","name":"%s","amount":%d,"currency":"%s"}`, orderID(number), dish, amount, currency)
	_ = conn.SetDeadline(time.Now().Add(30 * time.Second))
	if _, err := fmt.Fprintf(conn, "POST /v1/orders HTTP/1.1\r\nHost: %s\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s",
		c.addr, len(body), body); err != nil {
		return errors.Join(err, conn.Close())
	}
	response, err := http.ReadResponse(conn.reader, nil)
	if err != nil {
		return errors.Join(err, conn.Close())
	}
	defer response.Body.Close()
	text, err := io.ReadAll(response.Body)
	if err != nil || response.Close {
		return errors.Join(err, conn.Close())
	}
	conn.used = time.Now()
	c.mu.Lock()
	c.idle = append(c.idle, conn)
	c.mu.Unlock()
	if response.StatusCode != http.StatusCreated {
		return fmt.Errorf("%s: %s", response.Status, text)
	}
	return nil
}

func (c *client) take() (*connection, error) {
	c.mu.Lock()
	for last := len(c.idle) - 1; last >= 0; last-- {
		conn := c.idle[last]
		c.idle = c.idle[:last]
		if time.Since(conn.used) < longestIdle {
			c.mu.Unlock()
			return conn, nil
		}
		conn.Close()
	}
	c.mu.Unlock()
	conn, err := net.DialTimeout("tcp", c.addr, 5*time.Second)
	if err != nil {
		return nil, err
	}
	return &connection{Conn: conn, reader: bufio.NewReader(conn)}, nil
}

func (c *client) close() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, conn := range c.idle {
		conn.Close()
	}
	c.idle = nil
}
