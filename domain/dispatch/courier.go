package dispatch

import (
	"context"

	"takeout/domain"
)

// CourierID names a courier: 1 to 64 of A-Z a-z 0-9 _ and -. Only ParseCourierID makes one from outside text.
type CourierID struct{ s string }

// ParseCourierID returns the id, or an Invalid error.
func ParseCourierID(s string) (CourierID, error) {
	if err := domain.CheckID("courier_id", s); err != nil {
		return CourierID{}, err
	}
	return CourierID{s}, nil
}

// String returns the id as text.
func (id CourierID) String() string { return id.s }

// Limits of a courier.
const (
	MaxCourierName = 60    // code points
	MaxCapacity    = 10000 // orders at the same time
)

// Courier is a person on the roster.
type Courier struct {
	id       CourierID
	name     string
	onDuty   bool
	capacity int
	active   int
}

// SameAs reports whether both are the same courier on the same terms, whatever they carry.
func (c Courier) SameAs(other Courier) bool {
	c.active, other.active = 0, 0
	return c == other
}

// NewCourier returns a courier with nothing to carry. The capacity is how many orders they carry at the same time,
// 0 for no limit. It is Invalid if a value is out of its limits.
func NewCourier(id CourierID, name string, onDuty bool, capacity int) (Courier, error) {
	c := Courier{id: id, onDuty: onDuty}
	if id == (CourierID{}) {
		return c, domain.InvalidField("courier_id", "courier_id_invalid", "courier_id must not be empty")
	}
	return c.Change(&name, &onDuty, &capacity)
}

// Change returns the courier with those of the values that are not nil. It is Invalid if one is out of its limits.
func (c Courier) Change(name *string, onDuty *bool, capacity *int) (Courier, error) {
	if name != nil {
		if err := domain.CheckName("name", *name, MaxCourierName); err != nil {
			return c, err
		}
		c.name = *name
	}
	if onDuty != nil {
		c.onDuty = *onDuty
	}
	if capacity != nil {
		if *capacity < 0 || *capacity > MaxCapacity {
			return c, domain.InvalidField("capacity", "capacity_out_of_range",
				"capacity must be between 0 (no limit) and %d", MaxCapacity)
		}
		c.capacity = *capacity
	}
	return c, nil
}

// RestoreCourier is for stores only: it trusts the values.
func RestoreCourier(id, name string, onDuty bool, capacity, active int) Courier {
	return Courier{CourierID{id}, name, onDuty, capacity, active}
}

// ID returns the courier's id.
func (c Courier) ID() CourierID { return c.id }

// Name returns the courier's name.
func (c Courier) Name() string { return c.name }

// OnDuty reports whether the courier takes orders.
func (c Courier) OnDuty() bool { return c.onDuty }

// Capacity returns how many orders the courier carries at the same time, 0 for no limit.
func (c Courier) Capacity() int { return c.capacity }

// Active returns how many orders the courier carries now.
func (c Courier) Active() int { return c.active }

// Roster stores couriers. It is bound to the transaction that it was made for.
type Roster interface {
	// Add stores a new courier. Conflict if the id is taken.
	Add(ctx context.Context, c Courier) error
	// List returns all couriers by id.
	List(ctx context.Context) ([]Courier, error)
	// Update locks the courier, lets change return what they become, saves and returns it. NotFound if there is
	// none.
	Update(ctx context.Context, id CourierID, change func(Courier) (Courier, error)) (Courier, error)
	// Take picks a courier who is on duty and has room, and counts one more order for them. That they are on
	// duty and have room holds until the transaction ends; two transactions that take different couriers do not
	// wait for each other, nor do two that take the same one whose capacity has no limit. Exhausted if there is
	// nobody. Room that has a limit belongs to the orders that wait, if any do, and is not taken for another one.
	Take(ctx context.Context) (CourierID, error)
	// TakeAll is Take for so many orders, all or none: it is Exhausted as well if there is not room for all of them. It
	// spreads the orders evenly.
	TakeAll(ctx context.Context, orders int) ([]CourierID, error)
	// TakeMany picks couriers for so many orders that wait, or for as many as there is room, and counts them. It
	// spreads the orders evenly, and keeps everybody who has room as they are until the transaction ends.
	TakeMany(ctx context.Context, orders int) ([]CourierID, error)
	// Count adds the orders to what the courier carries, or takes them off if negative. A courier who is not on the
	// roster, or has no limit, is not counted.
	Count(ctx context.Context, id CourierID, orders int) error
}
