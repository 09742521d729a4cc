package app

// Patient makes placements wait for those that are being stored however long these take.
func (s *Orders) Patient() { s.together.Patience = 0 }

// Waiting returns how many placements wait to be stored.
func (s *Orders) Waiting() int {
	s.together.mu.Lock()
	defer s.together.mu.Unlock()
	return len(s.together.queue)
}

// AtOnce returns how many transactions Place has at the same time.
func (s *Orders) AtOnce() int { return s.together.Parallel }
