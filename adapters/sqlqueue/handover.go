package sqlqueue

import (
	"context"
	"sync"
	"time"
)

// Handover gives rows that this process has stored to their reader in this process, which would otherwise have to look
// for them, lease them and read them. Their lease is stored with them, so that nobody else takes them; a process that dies
// before they are handed over leaves them to others when it ends. The zero Handover is ready.
type Handover struct {
	mu      sync.Mutex
	readers map[string]*subscription // by queue
	gaps    time.Time                // until when several rows at once are not handed over
}

// gapsPause is how long several rows at once are not handed over after rows were missing under their ids: the database
// may number them with gaps.
const gapsPause = time.Minute

// Promise is a reader's word to take rows that a transaction is about to store. It must be kept when they are committed, or
// withdrawn if they are not for sure. The nil Promise is nobody's: rows stored under it are looked for.
type Promise struct {
	reader *subscription
	rows   int
	made   time.Time
}

// Promise returns the promise to take n rows of the queue, nil if no reader here can.
func (h *Handover) Promise(queue string, n int) *Promise {
	h.mu.Lock()
	s := h.readers[queue]
	if n > 1 && time.Now().Before(h.gaps) {
		s = nil
	}
	h.mu.Unlock()
	if s == nil || s.cfg.Ready(past) != nil || !s.promise(n) {
		return nil
	}
	return &Promise{s, n, time.Now()}
}

// past is a context that has ended: who would have to wait does not.
var past = func() context.Context {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	return ctx
}()

// Lease returns the SQL expressions with which the rows' columns attempts and available_at must be stored.
func (p *Promise) Lease() (attempts, availableAt string) {
	if p == nil {
		return "0", "0"
	}
	return "1", p.reader.lease()
}

// Keep hands the rows over, which are committed. If the reader has stopped meanwhile, they become available to others.
func (p *Promise) Keep(rows []Row) {
	s := p.reader
	for i := range rows {
		rows[i].attempts, rows[i].taken, rows[i].promised = 1, p.made, true
	}
	s.cfg.Handover.mu.Lock()
	stopped := s.stopped
	if !stopped {
		s.handed <- rows // which has room for all that is promised
	}
	s.cfg.Handover.mu.Unlock()
	if stopped {
		s.giveBack(rows)
		s.cfg.Bell.Ring(s.cfg.Queue)
	}
}

// Withdraw says that the rows are not stored, or may not be. It does nothing to the nil Promise.
func (p *Promise) Withdraw() {
	if p != nil {
		p.reader.fulfil(p.rows)
	}
}

// begin lets rows be handed over to s.
func (h *Handover) begin(s *subscription) {
	if h == nil {
		return
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.readers == nil {
		h.readers = make(map[string]*subscription)
	}
	h.readers[s.cfg.Queue] = s
}

// end makes s.handed stay as it is.
func (h *Handover) end(s *subscription) {
	if h == nil {
		return
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	s.stopped = true
	if h.readers[s.cfg.Queue] == s {
		delete(h.readers, s.cfg.Queue)
	}
}

// missed says that rows were not there under the ids that they were handed over with.
func (h *Handover) missed() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.gaps = time.Now().Add(gapsPause)
}

// promise takes n of the places for rows that are handed over, and reports whether there were as many. There are none while
// others wait to be read: new rows would overtake them, and messages are handled in about the order in which they were stored.
func (s *subscription) promise(n int) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.behind || s.promised+n > s.cfg.Window/2 {
		return false
	}
	s.promised += n
	return true
}

// fulfil gives n such places back.
func (s *subscription) fulfil(n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.promised -= n
}

// found notes whether there were as many rows to read as there was room for, so that more may wait.
func (s *subscription) found(full bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.behind = full
}
