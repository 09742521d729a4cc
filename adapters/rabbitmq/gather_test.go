package rabbitmq

import (
	"bytes"
	"errors"
	"io"
	"net"
	"testing"
	"time"
)

func TestWhatIsWrittenInPartsArrivesWholeAndInOrder(t *testing.T) {
	client, server := net.Pipe()
	c := newGatheringConn(client, time.Minute, func(err error) { t.Errorf("a write failed: %v", err) })
	defer c.Close()
	if err := server.SetReadDeadline(time.Now().Add(20 * time.Second)); err != nil {
		t.Fatal(err)
	}
	var want []byte
	got := make(chan []byte)
	const size = 3 * gatherLimit // so that writers have to wait for room
	go func() {
		all, _ := io.ReadAll(io.LimitReader(server, size))
		got <- all
	}()
	for i := 0; len(want) < size; i++ {
		part := bytes.Repeat([]byte{byte(i)}, min(i%4096+1, size-len(want)))
		want = append(want, part...)
		if n, err := c.Write(part); n != len(part) || err != nil {
			t.Fatalf("wrote %d of %d: %v", n, len(part), err)
		}
		clear(part) // it is the caller's again
	}
	if !bytes.Equal(want, <-got) {
		t.Fatal("what arrived differs from what was written")
	}
}

func TestWriterWhoseReaderStopsIsFreedAndToldOnce(t *testing.T) {
	client, _ := net.Pipe() // nobody reads
	told := make(chan error, 2)
	c := newGatheringConn(client, 20*time.Millisecond, func(err error) { told <- err })
	defer c.Close()
	var err error
	for err == nil { // the first ones are taken, then there is no room, and then it has failed
		_, err = c.Write(make([]byte, gatherLimit/2))
	}
	if cause := <-told; !errors.Is(cause, err) {
		t.Fatalf("writers are told %v, the connection's owner %v", err, cause)
	}
	if len(told) > 0 {
		t.Fatal("it was told again")
	}
}

func TestClosedConnectionTakesNothing(t *testing.T) {
	client, _ := net.Pipe()
	c := newGatheringConn(client, time.Minute, func(error) {})
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Write([]byte("x")); !errors.Is(err, net.ErrClosed) {
		t.Fatalf("writing to it says %v", err)
	}
}
