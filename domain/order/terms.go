package order

import (
	"time"

	"takeout/domain"
)

// Terms is what was ordered, as an event told it: what the other services keep of an order.
type Terms struct {
	OrderID  ID
	Name     string
	Money    domain.Money
	PlacedAt time.Time // UTC
	Version  int64     // of the order that the event told of
}

// Newer reports whether an event told these terms of a newer version of the order than those.
func (t Terms) Newer(than Terms) bool { return t.Version > than.Version }

// Correct takes over what a newer version of the order says, and reports whether anything but the version changed. The
// version is taken over also if nothing else did, so that what an older one says is late. It is Invalid if
// now has another amount, or under a version that is not newer another name: then it is another order.
func (t *Terms) Correct(now Terms) (bool, error) {
	newer := now.Newer(*t)
	if t.Money != now.Money || t.Name != now.Name && !newer {
		return false, domain.Errorf(domain.Invalid, "order_mismatch",
			"order %s is known with another name or amount than this event says", now.OrderID)
	}
	if !newer {
		return false, nil
	}
	changed := t.Name != now.Name || !t.PlacedAt.Equal(now.PlacedAt)
	*t = now
	return changed, nil
}
