package sqlqueue

import "sync"

// Bell wakes all readers of this process that are waiting. The zero Bell is ready.
type Bell struct {
	mu    sync.Mutex
	heard chan struct{}
}

// Ring wakes everybody who waits.
func (b *Bell) Ring() {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.heard != nil {
		close(b.heard)
		b.heard = nil
	}
}

// Heard returns a channel that is closed at the next Ring.
func (b *Bell) Heard() <-chan struct{} {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.heard == nil {
		b.heard = make(chan struct{})
	}
	return b.heard
}
