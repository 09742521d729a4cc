package check

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"strings"
)

// search adds a violation for each canary in the text. No violation repeats one.
func (c *checker) search(text string, where tell, orderID string) {
	for i, canary := range c.in.Canaries {
		if canary != "" && strings.Contains(text, canary) {
			c.add("I15", "leaked", orderID, -1, func() string {
				return says("canary %d of %d is in %s", i+1, len(c.in.Canaries), where())()
			})
		}
	}
}

func (c *checker) readLogs(ctx context.Context) error {
	for _, name := range c.in.Logs {
		if err := c.readLog(ctx, name); err != nil {
			return err
		}
	}
	return nil
}

// readLog searches a file of any size. A canary is reported once for each file.
func (c *checker) readLog(ctx context.Context, name string) error {
	file, err := os.Open(name)
	if err != nil {
		return err
	}
	defer func() { _ = file.Close() }()
	longest := 1
	for _, canary := range c.in.Canaries {
		longest = max(longest, len(canary))
	}
	buffer := make([]byte, 1<<20+longest)
	found := map[int]bool{}
	for kept, offset := 0, int64(0); ; {
		if err := ctx.Err(); err != nil {
			return err
		}
		n, err := io.ReadFull(file, buffer[kept:])
		c.report.LogBytes += int64(n)
		have := buffer[:kept+n]
		for i, canary := range c.in.Canaries {
			at := bytes.Index(have, []byte(canary))
			if canary == "" || at < 0 || found[i] {
				continue
			}
			found[i] = true
			c.add("I15", "leaked", "", -1, says("canary %d of %d is in the log %s at byte %d", i+1, len(c.in.Canaries), name, offset+int64(at)))
		}
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			return nil
		}
		if err != nil {
			return err
		}
		kept = longest - 1 // the beginning of one may be at the end
		offset += int64(len(have) - kept)
		copy(buffer, have[len(have)-kept:])
	}
}
